"""Laws of the page in a real browser: live, controllable, harmless, and usable without a mouse or eyes.

`make browser-test` installs Chromium and its driver from Debian's packages and runs these.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dashboard_tools import Stage, served
from sim_tools import write_file
from test_dashboard_app import FakeMachine, result_folder

from dtrain.experiments.dashboard_guard import Access
from dtrain.experiments.dashboard_stream import Hub
from dtrain.trainer.cli import main

webdriver = pytest.importorskip("selenium.webdriver")

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("processes")]

DEADLINE_S = 20.0
LIVE_S = 2.0
AXE = Path(os.environ.get("DTRAIN_AXE", "/nowhere"))
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}

Browser = Any


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium; one for all tests."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


class PausingMachine(FakeMachine):
    """One worker whose state follows the controls."""

    def __init__(self) -> None:
        super().__init__()
        self.state = "training"
        self.limits: dict[str, Any] = {"threads": 0, "hours": ""}

    def workers(self) -> list[dict[str, Any]]:
        counts = ("round", "tokens", "rounds_contributed", "bytes_up", "bytes_down", "bytes_today", "step")
        shares = ("tokens_per_s", "last_share_percent", "compute_share", "loss", "memory_gb")
        return [
            {
                **dict.fromkeys(counts, 12),
                **dict.fromkeys(shares, 0.5),
                "pid": 7,
                "name": "ada",
                "run_id": "test",
                "device": "cpu",
                "state": self.state,
                "pausing": self.state == "paused",
                "finishing": False,
                "held": "",
                "inner_steps": 15,
                "started": time.time() - 100,
                "progress": {"stage": "", "done": 0.0, "total": 0.0},
                "limits": self.limits,
            }
        ]

    def act(self, action: str, pid: int) -> dict[str, Any]:
        self.state = {"pause": "paused", "resume": "training", "finish": "leaving"}[action]
        return super().act(action, pid)

    def set_limits(self, pid: int, changes: dict[str, Any]) -> dict[str, Any]:
        self.limits.update(changes)
        return super().set_limits(pid, changes)


class Page:
    """A dashboard and the browser that looks at it."""

    def __init__(self, browser: Browser, stage: Stage, address: str, machine: PausingMachine, server: Any):
        self.browser, self.stage, self.address, self.machine, self.server = (
            browser,
            stage,
            address,
            machine,
            server,
        )

    def open(self, where: str = "#token=secret") -> None:
        self.browser.get("about:blank")
        self.browser.get(f"{self.address}/{where}")

    def text(self, selector: str) -> str:
        found = self.browser.find_elements("css selector", selector)
        return found[0].text if found else ""

    def click(self, selector: str) -> None:
        self.until(lambda: self.browser.find_elements("css selector", selector), selector)
        self.browser.find_element("css selector", selector).click()

    def run(self, script: str, *args: Any) -> Any:
        return self.browser.execute_script(script, *args)

    def until(self, look: Callable[[], Any], what: str, within_s: float = DEADLINE_S) -> float:
        """Seconds until it was so."""
        began = time.monotonic()
        while not look():
            assert time.monotonic() - began < within_s, what
            time.sleep(0.05)
        return time.monotonic() - began

    def complaints(self, *allowed: str) -> list[str]:
        """What the console holds, but for failed requests that the test brings about itself."""
        told = [entry["message"] for entry in self.browser.get_log("browser")]
        return [line for line in told if not any(word in line for word in allowed)]


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Iterator[Page]:
    stage, machine = Stage(tmp_path / "dashboard"), PausingMachine()
    stage.enter("ada", "bert", "carla")
    for _ in range(12):
        stage.play_round()
    result_folder(tmp_path / "results" / "a", 4, 60)
    browser.get_log("browser")
    with served(stage, Access(token="secret"), tmp_path / "results", machine) as (address, server):
        shown = Page(browser, stage, address, machine, server)
        shown.open()
        shown.until(lambda: "12" in shown.text("#health-line"), "the page shows the run")
        yield shown
        browser.get("about:blank")
    stage.history.close()


def test_an_event_is_on_the_page_within_two_seconds(page: Page) -> None:
    """A worker that joins, a round that ends, one that is paused: seen without a reload, curves too."""
    page.stage.enter("dora")
    page.stage.play_round()
    page.until(lambda: "dora joined" in page.text("#events"), "the event", LIVE_S)
    page.until(lambda: "dora" in page.text("#workers"), "the worker", LIVE_S)
    page.until(lambda: "13 of 20" in page.text("#health-line"), "the round", LIVE_S)
    page.until(lambda: "after round 13" in page.run(LOSS_LABEL), "the curve", LIVE_S)
    page.stage.actors["dora"].state = "paused"
    page.stage.tick()
    page.until(lambda: "paused" in page.text("#workers"), "the state", LIVE_S)
    assert page.complaints() == []


LOSS_LABEL = "return document.getElementById('loss-chart').getAttribute('aria-label') ?? ''"


def test_every_panel_has_something(page: Page) -> None:
    """No panel of a living run is empty."""
    for panel in ("#figures", "#lanes", "#workers", "#bytes", "#board", "#events", "#join-body", "#sample"):
        assert page.text(panel), panel
    for chart in ("#loss-chart", "#speed-chart"):
        assert page.run("return document.querySelector(arguments[0] + ' canvas').width", chart) > 100
    assert page.run("return document.querySelector('#join img').naturalWidth") > 50
    assert page.complaints() == []


def test_the_page_pauses_and_limits_the_worker(page: Page) -> None:
    """One click pauses, another goes on; a limit that is typed is set, and nothing else is."""
    page.browser.get(f"{page.address}/#machine")
    button = "#page-machine button.main"
    page.until(lambda: page.text(button) == "Pause", "the button")
    page.click(button)
    page.until(lambda: page.machine.told == [("pause", 7)], "the worker is told")
    page.until(lambda: page.text(button) == "Resume", "the state is shown")
    page.click(button)
    page.until(lambda: page.machine.told[-1] == ("resume", 7), "the worker is told")
    field = page.browser.find_element("css selector", "input[name=threads]")
    field.clear()
    field.send_keys("3")
    page.click("form.limits button")
    page.until(lambda: page.machine.told[-1] == ("limits", 7, {"threads": 3}), "the limit is set")
    assert "hello" in page.text(".log")
    assert page.complaints() == []


def test_without_the_token_the_page_controls_nothing(page: Page) -> None:
    """Who comes without the printed address reads the run and is told how to get further."""
    page.run("sessionStorage.clear()")
    page.open("#machine")
    page.until(lambda: "dtrain dashboard" in page.text("#page-machine"), "the reason")
    assert page.machine.told == []
    assert page.complaints("403") == []


def test_the_token_does_not_stay_in_the_address(page: Page) -> None:
    """Nobody gets it from a screen that is shared or a link that is passed on."""
    assert "secret" not in page.browser.current_url


def test_a_lost_connection_is_said_and_mended(page: Page) -> None:
    """While the server is gone a banner says how old the page is; when it is back the banner goes and news come."""
    page.stage.hub.is_closed = True
    page.server.should_exit = True
    page.until(lambda: "No connection" in page.text("#banner"), "the banner")
    assert "old" in page.text("#banner")
    page.stage.hub = Hub()
    page.stage.play_round()
    port = int(page.address.rpartition(":")[2])
    with served(page.stage, Access(token="secret"), port=port):
        page.until(lambda: not page.text("#banner"), "the banner goes")
        page.until(lambda: "13 of 20" in page.text("#health-line"), "news come")
    page.complaints()


def test_the_runs_own_trouble_is_a_banner(page: Page) -> None:
    """So does the observer's lost connection to the run, which the page's own connection knows nothing of."""
    page.stage.hub.publish({**page.stage.tick(), "connection": "The connection to the run is lost"})
    page.until(lambda: "to the run is lost" in page.text("#banner"), "the banner", LIVE_S)
    page.stage.tick()
    page.until(lambda: not page.text("#banner"), "the banner goes", LIVE_S)


def names(page: Page) -> list[str]:
    cells = page.browser.find_elements("css selector", "#workers tbody td:first-child span:first-child")
    return [cell.text for cell in cells]


def test_the_table_is_sorted_by_a_column(page: Page) -> None:
    """A head sorts, a second time the other way round, by keyboard too; it stays so when news come."""
    head = page.browser.find_element("xpath", "//table[@id='workers']//button[text()='Tokens/s']")
    head.click()  # the fastest in the last round come first
    assert names(page) == ["ada", "bert", "carla"]
    head.send_keys("\n")
    assert names(page) == ["carla", "bert", "ada"]
    assert head.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    page.stage.enter("dora")  # the fastest, by what it says of its first round
    page.stage.play_round()
    page.until(lambda: names(page) == ["carla", "bert", "ada", "dora"], "sorted by the news")


def test_the_command_is_copied(page: Page) -> None:
    """What is in the clipboard after a click is what a newcomer types."""
    grant = {"origin": page.address, "permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    page.browser.execute_cdp_cmd("Browser.grantPermissions", grant)
    page.click("#copy")
    page.until(lambda: page.text("#copy") == "Copied", "the button says so")
    copied = page.browser.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert copied == f"dtrain join {page.stage.invite}"


def test_experiments_are_laid_over_each_other(page: Page) -> None:
    """Runs are overlaid, filtered, grouped and unticked; the address restores the view."""
    page.browser.get(f"{page.address}/#experiments")
    drawn = "return document.getElementById('overlay')?.dataset.runs"
    page.until(lambda: page.run(drawn) == "4", "four curves")
    page.click("#runs tbody input")
    page.until(lambda: page.run(drawn) == "3", "three curves")
    find = page.browser.find_element("id", "find")
    find.send_keys("run-2")
    page.until(lambda: page.run(drawn) == "1", "one curve")
    page.click("#check-logx")
    page.until(lambda: "logx=1" in page.browser.current_url, "the address")
    address = page.browser.current_url
    page.browser.get("about:blank")
    page.browser.get(address)
    page.until(lambda: page.run(drawn) == "1", "the view is restored")
    assert page.browser.find_element("id", "check-logx").is_selected()
    assert page.browser.find_element("id", "find").get_attribute("value") == "run-2"
    assert page.complaints() == []


def test_a_sweep_of_the_simulator_is_compared(page: Page, tmp_path: Path) -> None:
    """What `dtrain simulate` has written is overlaid, labelled, grouped by what is varied, and exported."""
    file = write_file(tmp_path, "[grid]\n'codec.k' = [64, 256]\n[network]\nprofile = 'dsl'\n")
    command = ["simulate", str(file), "--seeds", "2", "--out", str(tmp_path / "results" / "tiny")]
    assert main([*command, "--jobs", "1"]) == 0
    page.browser.get(f"{page.address}/#experiments?find=tiny&runs=")
    page.until(lambda: page.text("#runs").count("k=64") == page.text("#runs").count("k=256") == 2, "the runs")
    page.browser.find_element("xpath", "//button[text()='Show all']").click()
    drawn = "return document.getElementById('overlay')?.dataset.runs"
    page.until(lambda: page.run(drawn) == "4", "two settings, two seeds")
    page.until(lambda: len(set(page.run(SWATCHES))) == 4, "a colour for each")
    page.click("#choose-group option[value='codec.k']")
    page.until(lambda: len(set(page.run(SWATCHES))) == 2, "a colour for each k")
    assert page.run(DRAWN_PIXELS) > 100
    assert page.complaints() == []


SWATCHES = "return [...document.querySelectorAll('#runs .swatch')].map((one) => one.style.borderColor)"
DRAWN_PIXELS = """
const canvas = document.querySelector('#overlay canvas');
const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
return data.filter((value, at) => at % 4 === 3 && value > 0).length;
"""


HOSTILE = [
    "<img src=x onerror=window.hacked=1>",
    "<script>window.hacked=1</script>",
    "\u202eevil",
    "a\x00b",
    "x" * 10**6,
]


def test_hostile_text_is_only_text(page: Page) -> None:
    """Names, events and samples made of markup are shown as they are; nothing of them runs, nothing bursts the page."""
    from dtrain.trainer.bulletin import Sample

    for index, text in enumerate(HOSTILE):
        page.stage.enter(f"h{index}")
        actor = page.stage.actors[f"h{index}"]
        actor.changes.update(name=text, device=text)
        actor.bulletin.event(page.stage.now, "problem", text)
    page.stage.samples = {page.stage.actors["ada"].peer_id: Sample(13, HOSTILE[0], HOSTILE[1])}
    page.stage.play_round()
    page.until(lambda: "<script>" in page.text("#workers"), "the name as text", LIVE_S)
    page.until(lambda: "<script>" in page.text("#sample"), "the sample as text", LIVE_S)
    assert page.run("return window.hacked") is None
    assert page.run("return document.querySelectorAll('main script, main img:not(#join img)').length") == 0
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    assert page.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("where", ["run", "machine", "experiments"])
def test_axe_finds_nothing_serious(page: Page, where: str, width: str, scheme: str) -> None:
    """Contrast, names, roles and order hold for those who read by keyboard, screen reader or on a phone."""
    if not AXE.exists():
        pytest.skip("make browser-test brings axe-core")
    size = {
        "width": WIDTHS[width][0],
        "height": WIDTHS[width][1],
        "deviceScaleFactor": 1,
        "mobile": width == "phone",
    }
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page.browser.get(f"{page.address}/#{where}")
        page.until(lambda: page.run(f"return !!document.querySelector('#page-{where} section')"), "the page")
        page.until(lambda: page.run("return document.documentElement.scrollWidth <= innerWidth"), "it fits")
        page.browser.execute_cdp_cmd("Runtime.evaluate", {"expression": AXE.read_text()})
        found = page.browser.execute_async_script("axe.run(document).then(arguments[0])")
        serious = [
            (rule["id"], node["html"][:200], node.get("failureSummary"))
            for rule in found["violations"]
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]
        assert serious == [] and len(found["passes"]) > 10
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_keyboard_reaches_everything(page: Page) -> None:
    """The first tab stop skips to the content, and every control has a visible focus."""
    page.run("document.activeElement.blur()")
    page.browser.find_element("css selector", "body").send_keys("\ue004")
    assert page.run("return document.activeElement.className") == "skip"
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") != "none"
