// Sortable tables that change in place.
import { element, setText, say } from "./dom.js";

// columns: [{key, title, text: row -> string or node-filling function, value: row -> number or string, minor, isText}]
export class SortedTable {
  constructor(table, { caption, columns, key, order, onOrder, decorate }) {
    Object.assign(this, { table, columns, key, order, onOrder, decorate });
    this.lines = new Map();
    this.body = element("tbody");
    this.heads = columns.map((column) => {
      const label = column.value
        ? element("button", { type: "button", onclick: () => this.sortBy(column.key) }, column.title)
        : element("span", {}, column.title);
      return element("th", { scope: "col", class: classes(column) }, label);
    });
    table.replaceChildren(
      element("caption", { class: "hidden-text" }, caption), element("thead", {}, element("tr", {}, ...this.heads)), this.body);
    this.mark();
  }

  sortBy(key) {
    const [now, downwards] = this.order;
    const column = this.columns.find((one) => one.key === key);
    this.order = [key, now === key ? !downwards : !column.isText];
    this.mark();
    this.show(this.rows ?? []);
    this.onOrder?.(this.order);
    say(`Sorted by ${column.title}, ${this.order[1] ? "highest" : "lowest"} first`);
  }

  mark() {
    this.columns.forEach((column, index) => {
      if (column.key === this.order[0]) this.heads[index].setAttribute("aria-sort", this.order[1] ? "descending" : "ascending");
      else this.heads[index].removeAttribute("aria-sort");
    });
  }

  show(rows) {
    this.rows = rows;
    const column = this.columns.find((one) => one.key === this.order[0]) ?? this.columns[0];
    const sorted = rows.map((row) => [column.value(row), row]).sort(([a], [b]) => compare(a, b) * (this.order[1] ? -1 : 1));
    const kept = new Set();
    sorted.forEach(([, row], index) => {
      const key = this.key(row);
      kept.add(key);
      let line = this.lines.get(key);
      if (!line) {
        line = element("tr", {}, ...this.columns.map((one) => element("td", { class: classes(one) })));
        this.lines.set(key, line);
      }
      this.columns.forEach((one, place) => {
        if (one.fill) one.fill(line.cells[place], row);
        else setText(line.cells[place], one.text(row));
      });
      this.decorate?.(line, row);
      if (this.body.children[index] !== line) this.body.insertBefore(line, this.body.children[index] ?? null);
    });
    for (const [key, line] of this.lines) {
      if (!kept.has(key)) { line.remove(); this.lines.delete(key); }
    }
  }
}

const classes = (column) => [column.isText && "text", column.minor && "minor"].filter(Boolean).join(" ") || undefined;

function compare(a, b) {
  if (a === b) return 0;
  if (a === null || a === undefined) return 1;
  if (b === null || b === undefined) return -1;
  if (typeof a === "string" && typeof b === "string") return a.localeCompare(b, undefined, { numeric: true });
  return a < b ? -1 : 1;
}
