// Numbers as people read them.

export function count(value) {
  if (value < 10000) return Math.round(value).toLocaleString("en");
  const [scale, unit] = value < 1e6 ? [1e3, "k"] : value < 1e9 ? [1e6, "M"] : value < 1e12 ? [1e9, "B"] : [1e12, "T"];
  return (value / scale).toPrecision(3) + unit;
}

export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let index = 0;
  while (value >= 999.5 && index < units.length - 1) { value /= 1000; index += 1; }
  return (index === 0 ? Math.round(value) : value.toPrecision(3)) + " " + units[index];
}

export function seconds(value) {
  if (value < 0.0995) return Math.round(1000 * value) + " ms";
  if (value < 9.95) return value.toFixed(1) + " s";
  return duration(value);
}

export function duration(value) {
  const whole = Math.round(value);
  if (whole < 60) return whole + " s";
  if (whole < 3600) return Math.floor(whole / 60) + " min" + (whole < 600 ? " " + (whole % 60) + " s" : "");
  if (whole < 86400) return Math.floor(whole / 3600) + " h " + Math.floor((whole % 3600) / 60) + " min";
  return Math.floor(whole / 86400) + " d " + Math.floor((whole % 86400) / 3600) + " h";
}

export const percent = (share) => (share * 100).toFixed(share < 0.0995 ? 1 : 0) + " %";

export const loss = (value) => value.toFixed(3);

export function clock(unixSeconds) {
  return new Date(1000 * unixSeconds).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
}

export function day(unixSeconds) {
  return new Date(1000 * unixSeconds).toLocaleDateString([], { year: "numeric", month: "short", day: "numeric" });
}
