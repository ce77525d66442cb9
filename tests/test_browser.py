"""The pages in a real browser, Debian's Chromium without a window: what one can click and type,
that no text becomes a script, how it looks on a phone, in the dark and on paper, how fast it is.

Skipped where there is no chromium with its driver (apt-get install chromium chromium-driver).
"""

import shutil
import sys
from pathlib import Path

import pytest
from page_data import HOSTILE, fake_evaluation, fake_run, write_lines
from test_compare import fake

import compare
from engine.files import read_lines
from pages import curves, reader, run

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

MINUS = "\N{MINUS SIGN}"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no browser: apt-get install chromium chromium-driver"
)
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --disable-dev-shm-usage""".split()


class Browser:
    """One page at a time, and the few things that the tests do with it."""

    def __init__(self, profile: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))

    def open(
        self, page: Path, width: int = 1280, dark: bool = False, media: str = "screen"
    ) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        emulated = {"media": media, "features": [scheme]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", emulated)
        self.driver.get("about:blank")  # so that a page of the same address is loaded anew
        self.driver.get(page.as_uri())

    def all(self, selector: str) -> list:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.js(
            f"return [...document.querySelectorAll('{selector}')].map(n => n.textContent)"
        )

    def js(self, script: str, *args):
        return self.driver.execute_script(script, *args)

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    def focused(self):
        return self.driver.switch_to.active_element

    def complaints(self) -> list:
        return self.driver.get_log("browser")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture(scope="module")
def run_page(tmp_path_factory) -> Path:
    folder = fake_run(tmp_path_factory.mktemp("run"))
    return write(folder, run.run_page([run.read_run(folder)]))


@pytest.fixture(scope="module")
def reader_page(tmp_path_factory) -> Path:
    folder = fake_evaluation(tmp_path_factory.mktemp("evaluation"))
    return write(folder, reader.reader_page([reader.read_evaluation(folder)]))


def write(folder: Path, page: str) -> Path:
    (folder / "report.html").write_text(page)
    return folder / "report.html"


@pytest.fixture(autouse=True)
def silent(browser):
    """No page complains, whatever is done with it."""
    browser.complaints()
    yield
    assert browser.complaints() == []


# -------------------------------------------------------------------------------- a comparison


def test_a_comparison_opens_its_queries_and_fits_a_phone(browser, tmp_path, monkeypatch):
    """With queries that would be scripts."""
    folders = [fake(tmp_path / "a"), fake(tmp_path / "b", gain=-0.05, seed=3)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, folders)])
    compare.main()
    page = tmp_path / "comparison.html"
    browser.open(page, dark=True)
    assert browser.one("output").text == "8 of 8" and len(browser.all("figure svg")) == 3
    browser.all("tr.row")[0].click()
    assert any(text in browser.one("tr.detail").text for text in HOSTILE[:2])
    assert len(browser.all("tr.detail li")) == 2
    browser.one("input[type=search]").send_keys("q3")
    assert browser.one("output").text == "1 of 8"
    assert browser.js("return window.pwned") is None
    browser.open(page, width=390)
    assert browser.js("return document.documentElement.scrollWidth") <= 390


# ---------------------------------------------------------------------------------- a run's page


def test_a_response_opens_to_its_window_and_labels_lead_to_passages(browser, run_page):
    browser.open(run_page)
    rows = browser.all("tr.row")
    assert len(rows) == 72 and browser.one("output").text == "72 of 72"
    rows[1].click()
    assert len(browser.all("tr.detail")) == 1
    logged = [r for g in read_lines(run_page.parent / "responses.jsonl") for r in g["responses"]]
    assert browser.one(".response").text.split() in [r["response"].split() for r in logged]
    assert len(browser.all(".passages li")) == 5 == len(browser.all(".passages .grade"))
    links = browser.all(".response a.label")
    assert len(links) == 10  # five in the reasoning, five in the answer
    link = links[2]
    label = link.text
    link.click()
    passage = browser.focused()
    assert passage.tag_name == "li" and passage.text.startswith(label)
    assert "lit" in link.get_attribute("class").split()  # and each mention of it shows
    browser.press(Keys.ESCAPE)
    assert browser.focused() == link
    assert browser.one("#card").is_displayed()
    docid = passage.find_element(By.CSS_SELECTOR, ".docid").text
    assert browser.one("#card .docid").text == docid
    rows[1].click()
    assert not browser.all("tr.detail")


def test_responses_are_sorted_searched_and_filtered(browser, run_page):
    browser.open(run_page)

    def column(name: str) -> list[float]:
        return [float(text.replace(MINUS, "-")) for text in browser.texts(f"td.{name}")]

    heads = {head.text.strip(" ↑↓"): head for head in browser.all("#table th button")}
    assert column("step") == sorted(column("step"), reverse=True)
    heads["Reward"].click()
    assert column("reward") == sorted(column("reward"), reverse=True)
    heads["Reward"].click()
    assert column("reward") == sorted(column("reward"))
    assert browser.one("th.reward").get_attribute("aria-sort") == "ascending"
    browser.one("input[name=min-step]").send_keys("3")
    browser.one("input[name=max-step]").send_keys("4")
    assert set(column("step")) == {3, 4} and browser.one("output").text == "12 of 72"
    browser.one("input[name=min-reward]").send_keys("0.3")
    assert 0 < len(column("reward")) < 12 and min(column("reward")) >= 0.3
    query = browser.texts("td.query")[0]
    browser.one("input[type=search]").send_keys(query.upper())
    assert set(browser.texts("td.query")) == {query}


def test_runs_over_each_other_name_the_run_of_each_response(browser, tmp_path):
    folders = [fake_run(tmp_path / name, steps=3, seed=i) for i, name in enumerate(("one", "two"))]
    browser.open(write(tmp_path, run.run_page([run.read_run(folder) for folder in folders])))
    assert set(browser.texts("td.run")) == {"one", "two"}
    colors = {
        line.value_of_css_property("stroke") for line in browser.all('[style*="stroke: var(--run"]')
    }
    assert len(colors) == 2


# ---------------------------------------------------------------------------- the ranking reader


def test_a_query_is_read_with_the_keyboard_alone(browser, reader_page):
    browser.open(reader_page)
    queries = [text.strip(" 123") for text in browser.texts("td.query")]
    assert browser.one("#query h2").text == queries[0]  # the greatest loss is open already
    browser.press("j")
    assert browser.one("#query h2").text == queries[1]
    browser.press("k", "k", "k")
    assert browser.one("#query h2").text == queries[0]
    browser.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert (
        browser.one("#query h2").text == queries[0]
        and browser.focused().text.strip(" 123") == queries[2]
    )
    browser.press(Keys.ENTER)
    assert browser.one("#query h2").text == queries[2]
    assert browser.focused().get_attribute("id") == "query"
    reached = []
    for _ in range(6):  # what Tab comes to: the toggle, the two rankings, the windows
        browser.press(Keys.TAB)
        reached.append(browser.focused().tag_name)
    assert reached[:4] == ["button", "li", "li", "summary"]
    browser.press(Keys.ESCAPE)
    assert browser.focused().text.strip(" 123") == queries[2]
    browser.press("/")
    browser.press("malformed")
    assert browser.one("output").text == "2 of 6"


def test_what_moved_is_drawn_and_its_ends_light_up(browser, reader_page):
    browser.open(reader_page)
    sides = browser.all(".movement ol")
    assert [len(side.find_elements(By.CSS_SELECTOR, "[data-doc]")) for side in sides] != [30, 30]
    browser.one("h3 button").click()
    assert [len(s.find_elements(By.TAG_NAME, "li")) for s in browser.all(".movement ol")] == [
        30,
        30,
    ]
    assert len(browser.all(".movement path")) == 30
    moved = browser.js("""
        const row = document.querySelectorAll(".movement ol")[1].children[0];
        row.focus();
        const rank = (side) => [...document.querySelectorAll(".movement ol")[side].children]
            .findIndex((other) => other.dataset.doc === row.dataset.doc) + 1;
        const path = document.querySelector(`.movement path[data-doc="${row.dataset.doc}"]`);
        return [rank(0), rank(1), row.querySelector(".moved").textContent,
                [...document.querySelectorAll(".movement .lit")].length, path.getAttribute("d")]""")
    first, final, arrow, lit, path = moved
    assert final == 1 and arrow == ("" if first == 1 else f"▲{first - 1}") and lit == 3
    assert path.startswith(f"M0,{24 * (first - 0.5):g} ") and path.endswith(" 100,12")
    card = browser.one("#card").text
    assert f"first stage {first}" in card and "window: place given→answered. " in card


def test_windows_open_and_flag_what_went_wrong(browser, reader_page):
    browser.open(reader_page)
    flagged = [q for q in browser.all("button.open") if q.find_elements(By.CSS_SELECTOR, ".flag")]
    assert len(flagged) == 3
    flags = set()
    for query in flagged:
        query.click()
        windows = browser.all(".windows details")
        assert len(windows) == 2 and windows[1].get_attribute("open")  # the last one is open
        marks = windows[0].find_elements(By.CSS_SELECTOR, "summary .flag")
        flags.add(" ".join(mark.text for mark in marks))
        windows[0].find_element(By.TAG_NAME, "summary").click()
        assert len(windows[0].find_elements(By.CSS_SELECTOR, ".passages li")) == 20
        assert not windows[0].find_elements(By.CSS_SELECTOR, ".place")  # no answer was read
        assert len(windows[1].find_elements(By.CSS_SELECTOR, ".place")) == 20
    assert flags == {"malformed", "malformed cut off", "too long"}
    browser.one("input[type=search]").send_keys("too long")
    assert browser.one("output").text == "1 of 6"


def test_two_evaluations_stand_side_by_side(browser, tmp_path):
    folders = [fake_evaluation(tmp_path / name, seed=i) for i, name in enumerate(("one", "two"))]
    evaluations = [reader.read_evaluation(folder) for folder in folders]
    browser.open(write(tmp_path, reader.reader_page(evaluations)))
    differences = [abs(float(t.replace(MINUS, "-"))) for t in browser.texts("td.gain")]
    assert differences == sorted(differences, reverse=True)
    assert browser.texts(".movement h4") == ["A: one", "B: two"]
    assert len(browser.all(".windows.two > div")) == 2 and len(browser.all(".windows details")) == 4
    address = browser.driver.current_url
    assert "#q=q" in address
    browser.driver.get(address.split("#")[0] + "#q=q3")
    browser.driver.refresh()
    assert "query q3." in browser.one("#query .note").text


def test_54_queries_of_9_windows_open_in_a_second(browser, tmp_path):
    folder = fake_evaluation(tmp_path, queries=54, depth=100, tokens=850)
    assert sum(1 for _ in read_lines(folder / "windows.jsonl")) == 54 * 9
    page = write(folder, reader.reader_page([reader.read_evaluation(folder)]))
    times = []
    for _ in range(3):  # the machine may be busy with something else
        browser.open(page)
        times.append(browser.js("return performance.getEntriesByName('shown')[0].startTime"))
    print(f"{page.stat().st_size / 1e6:.1f} MB in {min(times):.0f} ms")
    assert len(browser.all("tr.row")) == 54 and browser.all(".response a.label")
    assert min(times) < 1000


# ---------------------------------------------------------------------------------- both pages


@pytest.mark.parametrize("kind", ["run", "reader"])
def test_hostile_text_is_text(browser, tmp_path, kind):
    if kind == "run":
        folder = fake_run(tmp_path, hostile=True, steps=8, model=HOSTILE[1])
        page = run.run_page([run.read_run(folder)])
    else:
        folder = fake_evaluation(tmp_path, hostile=True, queries=8)
        page = reader.reader_page([reader.read_evaluation(folder)])
    browser.open(write(folder, page))
    for row in browser.all("tr.row")[:12]:
        browser.js("arguments[0].click()", row)
        browser.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        browser.js("""for (const node of document.querySelectorAll('[data-i], [data-doc]'))
            for (const name of ['mouseover', 'mouseenter', 'focusin'])
                node.dispatchEvent(new MouseEvent(name, { bubbles: true }))""")
        assert browser.js("return window.pwned") is None
        assert not browser.all("img, iframe, [onmouseover], script[src], a[href^=javascript]")
    shown = browser.js("return document.body.innerText")
    assert sum(text.split()[0] in shown for text in HOSTILE) >= 3


# Of all texts that stand there, those whose colour is too near to what lies under them.
FAINT = """
    const parts = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = (color) => parts(color).slice(0, 3).map((part) => part / 255)
        .map((part) => part > 0.04 ? ((part + 0.055) / 1.055) ** 2.4 : part / 12.92)
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
    const under = (node) => {
        const color = getComputedStyle(node).backgroundColor;
        return parts(color)[3] === 0 ? under(node.parentElement) : color;
    };
    const contrast = (node) => {
        const both = [getComputedStyle(node).color, under(node)].map(light);
        return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    };
    return [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() &&
        [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()) &&
        !node.closest("figure svg, script") && contrast(node) < 4.5).map((one) => one.outerHTML)"""


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_stands_out(browser, tmp_path, run_page, reader_page, dark):
    folders = [fake_run(tmp_path / str(i), steps=3, seed=i) for i in range(curves.RUNS)]
    runs = write(tmp_path, run.run_page([run.read_run(folder) for folder in folders]))
    for page in (run_page, runs, reader_page):
        browser.open(page, dark=dark)
        browser.one("button.open").click()
        browser.js(
            "document.querySelectorAll('[data-i], [data-doc]').forEach((one) => { "
            "one.classList.add('lit'); })"
        )
        assert browser.js(FAINT) == []


def test_a_query_as_long_as_a_letter_is_short_in_lists_and_whole_below(browser, tmp_path):
    letter = "Why does the tide come twice a day?\n" + "It puzzles me. " * 200
    evaluation, training = fake_evaluation(tmp_path / "a"), fake_run(tmp_path / "b", steps=2)
    for file in (evaluation / "queries.jsonl", training / "responses.jsonl"):
        write_lines(file, [record | {"query": letter} for record in read_lines(file)])
    pages = [
        write(evaluation, reader.reader_page([reader.read_evaluation(evaluation)])),
        write(training, run.run_page([run.read_run(training)])),
    ]
    for page in pages:
        browser.open(page)
        browser.one("button.open").click()
        assert browser.one("tr.row").size["height"] < 100
        assert browser.texts(".whole") == [letter]


def test_on_paper_a_response_has_the_wider_column(browser, reader_page):
    browser.open(reader_page, width=720, media="print")
    sizes = [browser.one(f".window {part}").size["width"] for part in (".passages", ".response")]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("kind", ["run", "reader"])
def test_a_page_fits_a_phone_the_dark_and_paper(browser, run_page, reader_page, kind):
    page = {"run": run_page, "reader": reader_page}[kind]
    browser.open(page, width=390)
    browser.one("button.open").click()
    browser.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    wide = """return [...document.querySelectorAll("#query *, #responses *")].filter((node) =>
        node.getBoundingClientRect().right > 391).length"""
    assert browser.js(wide) == 0
    background = "return getComputedStyle(document.documentElement).backgroundColor"
    light = browser.js(background)
    browser.open(page, dark=True)
    dark = browser.js(background)
    brightness = [sum(map(int, color[4:-1].split(", "))) for color in (light, dark)]
    assert brightness[0] > 700 and brightness[1] < 100
    browser.open(page, media="print", dark=True)
    assert not browser.one(".filters").is_displayed() and browser.one("#table").is_displayed()
    assert browser.js(background) == light  # whatever the screen is
