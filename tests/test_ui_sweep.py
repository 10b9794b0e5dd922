"""A sweep of more than a hundred runs in MLflow's own pages, seen by a real browser."""

import itertools
from pathlib import Path

import pytest
from browser import chromium, keep, served, wait_for_texts
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from tracking import MARKS, PGD, Notes, interval, recipe, record, stage
from waiting import PATIENCE_S

from arae.records import Model
from arae.runs import RunFolder
from arae.tracking import Family, Tracker, send_pending

pytestmark = [pytest.mark.integration, *MARKS]

RADII, WEIGHTS, SEEDS = (0.0, 0.5, 1.5, 3.0), (0.0, 0.01, 0.1, 1.0), (1, 2, 3)
EPS, FEATURE, PSNR = "encoder.attack.eps", "decoder.losses.feature", "final/psnr.reconstruction"
# What the plot draws: values by axis.
AXES = """
const plot = document.querySelector('.js-plotly-plot');
return plot && Object.fromEntries(plot.data[0].dimensions.map(axis => [axis.label, Array.from(axis.values)]));
"""


def psnr_of(eps: float, feature: float, seed: int) -> float:
    return 18 + 4 * eps / (eps + 0.5) + feature + 0.1 * seed


def make_sweep(root: Path) -> int:
    """A sweep as `arae sweep` tells MLflow of it: itself, its trials and under them the stages that each began.

    Returns how many runs that are.
    """
    runs = 0

    def run(name: str, parent: str | None, family: Family, eps: float, psnr: float | None) -> None:
        nonlocal runs
        what = recipe(name, encoder__attack__eps=eps, encoder__attack__norm="l2" if eps else None)
        folder = RunFolder.of(what, root)
        folder.create(what)
        with Tracker(folder, what, root, parent=parent, family=family, note=Notes()) as tracker:
            kind = family.tags["stage"]
            if kind in ("encoder", "decoder"):
                tracker(stage("started", kind))
                for step in (10, 20):
                    tracker(interval(step, 1 / step, kind))
                tracker(stage("finished", kind))
            if psnr is not None:
                model = Model(encoder="small-cnn", train_norm="l2", train_eps=eps)
                robust = record("robust_accuracy", 0.1 + eps / 6, threat=PGD, model=model)
                tracker.log_records([record("psnr", psnr, model=model), robust])
        runs += 1

    run("s", None, Family("s", "s", {}, {"stage": "sweep"}, delivered=False), 0.0, None)
    encoders = set[tuple[float, int]]()
    for number, (eps, feature, seed) in enumerate(itertools.product(RADII, WEIGHTS, SEEDS)):
        values = {EPS: eps, FEATURE: feature, "seed": seed}
        label, trial = f"eps={eps:g} feature={feature:g} seed={seed}", f"s/t{number:03d}"
        psnr = psnr_of(eps, feature, seed)
        run(trial, "s", Family("s", label, values, {"stage": "trial", "trial": label}, delivered=False), eps, psnr)
        kinds = ["encoder"] * ((eps, seed) not in encoders) + ["decoder"]
        encoders.add((eps, seed))
        for kind in kinds:
            family = Family("s", f"{kind} {number:08d}", {}, {"stage": kind}, delivered=False)
            run(f"stages/{kind}-{number}", trial, family, eps, None)
    return runs


def find(browser: Chrome, css: str) -> WebElement:
    """The first such element that is shown."""

    def shown(_: Chrome) -> WebElement | None:
        return next((each for each in browser.find_elements(By.CSS_SELECTOR, css) if each.is_displayed()), None)

    return WebDriverWait(browser, PATIENCE_S).until(shown, f"{css} is not on the page")


def test_the_trials_of_a_sweep_are_compared_by_radius_and_psnr(tmp_path: Path) -> None:
    """As a reader does it: open the experiment, choose the sweep's trials, compare them, add PSNR to the plot."""
    assert make_sweep(tmp_path) > 100
    assert send_pending(tmp_path) > 0
    trials = len(RADII) * len(WEIGHTS) * len(SEEDS)
    with served(tmp_path) as (_, uri), chromium(tmp_path / "profile", height=1200) as browser:
        browser.get(f"{uri}/#/experiments/1/runs")
        box = find(browser, "[data-testid=search-box]")
        page = wait_for_texts(browser, ["matching runs"])
        assert "eps=" not in page, "nested, all of it is one line, which opens"
        box.click()
        box.send_keys('tags.stage = "trial"', Keys.ENTER)
        wait_for_texts(browser, [f"{trials + 1} matching runs"])  # their parent is shown with them
        find(browser, "[role=gridcell] button[data-component-id*=runnamecellrenderer]").click()
        wait_for_texts(browser, ["eps=3"])
        select = browser.find_element(By.CSS_SELECTOR, "[aria-label='Select all runs']")
        browser.execute_script("arguments[0].click()", select)  # the box itself has no size
        keep(browser, tmp_path, "sweep-runs.png")
        find(browser, "[data-testid=runs-compare-button]").click()

        wait_for_texts(browser, [f"Comparing {trials + 1} Runs", "Parallel Coordinates Plot"])
        metrics = browser.find_element(By.XPATH, "//div[text()='Metrics:']/following-sibling::div")
        metrics.click()
        metrics.find_element(By.CSS_SELECTOR, "input").send_keys("psnr", Keys.ENTER, Keys.ESCAPE)
        drawn = WebDriverWait(browser, PATIENCE_S).until(
            lambda _: (axes := browser.execute_script(AXES)) and PSNR in axes and axes
        )
        keep(browser, tmp_path, "sweep-compared.png")
    axes = [FEATURE, EPS, "seed", PSNR]
    assert set(drawn) == set(axes), "a trial's parameters are what the sweep varies, and no more"
    points = sorted(zip(*(drawn[axis] for axis in axes), strict=True))
    expected = sorted((w, e, s, psnr_of(e, w, s)) for w, e, s in itertools.product(WEIGHTS, RADII, SEEDS))
    assert points[:-1] == [pytest.approx(point) for point in expected]  # the last is their parent, drawn beyond all
