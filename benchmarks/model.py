"""What eight A100 need of loader, network and disk: counted, measured, and from assumptions that are named.

`python -m benchmarks.model` makes the tables of `docs/scaling.md` anew. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from statistics import median

import yaml

from arae.config import Part, Recipe, load_recipe
from arae.cost import ADAM, FLOAT, SGD, Networks, parameters
from arae.files import write_text
from benchmarks.harness import BEGIN, END, FOLDER, Result, ratios, read
from benchmarks.loader import MODES, NAME
from benchmarks.scaled import Scaling, efficiency

PAGE = FOLDER.parent / "docs" / "scaling.md"
COUNTED = FOLDER / "counted.json"
"""What was counted, for counting takes ten seconds."""
GPUS = 8
IMAGENET = 1_281_167
PEAK = 312e12
"""FLOP/s of an A100 in bf16, by its maker."""
UTILISATION = (0.2, 0.4)
"""Shares of it that a training may reach: assumed. AlexNet's convolutions are small, ResNet's are not."""
LINKS = {
    "NVLink (1 node)": (8, 200e9),
    "100 Gbit/s (2 nodes)": (16, 10e9),
    "25 Gbit/s (2 nodes)": (16, 2.5e9),
    "10 Gbit/s (2 nodes)": (16, 1e9),
}
"""Workers, and bytes a second that a ring's slowest link carries: assumed, 80 % of an Ethernet's nominal rate."""
RECIPES = {
    "imagenet-alexnet": ((3, 224, 224), 1000),
    "imagenet-vgg16": ((3, 224, 224), 143),
    "cifar10-resnet18": ((3, 32, 32), 10),
    "cifar10-wrn28-10": ((3, 32, 32), 10),
}


class StageModel(Part):
    """One stage of one recipe: FLOPs an image, images a step, numbers trained, bytes of a state."""

    digest: str
    """Of the recipe: what was counted for another is not believed."""
    recipe: str
    stage: str
    flops: int
    batch: int
    trained: int
    state: int

    def rate(self, utilisation: float) -> float:
        """Images a second of one GPU."""
        return PEAK * utilisation / self.flops


def stages() -> list[StageModel]:
    """Both stages of every recipe; counted now where they were not before, in some seconds."""
    before = [StageModel.model_validate(one) for one in json.loads(COUNTED.read_text())] if COUNTED.is_file() else []
    found: list[StageModel] = []
    for name in RECIPES:
        recipe = load_recipe(name)
        found += [one for one in before if (one.recipe, one.digest) == (name, recipe.digest)] or count(recipe)
    return found


def count(recipe: Recipe) -> list[StageModel]:
    """The stages of a recipe, counted."""
    return list(_of(recipe, *RECIPES[recipe.name]))


def _of(recipe: Recipe, shape: tuple[int, int, int], classes: int) -> Iterable[StageModel]:
    networks = Networks(recipe, shape, classes)
    part, weights = recipe.encoder, parameters(networks.encoder)
    kept = weights * (1 + SGD + bool(part.ema))
    yield _stage(recipe, "encoder", networks.encoder_step(part.attack), weights, kept)
    if recipe.decoder and networks.decoder:
        part = recipe.decoder
        judge = parameters(networks.discriminator) if networks.discriminator else 0
        trained = parameters(networks.decoder) + judge
        flops = networks.decoder_step(max(1, part.batch // part.micro // GPUS))
        kept = trained * (1 + ADAM) + parameters(networks.decoder) * bool(part.ema)
        yield _stage(recipe, "decoder", flops, trained, kept)


def _stage(recipe: Recipe, stage: str, flops: int, trained: int, kept: int) -> StageModel:
    part = recipe.encoder if stage == "encoder" or not recipe.decoder else recipe.decoder
    known = {"digest": recipe.digest, "recipe": recipe.name, "stage": stage, "flops": flops, "batch": part.batch}
    return StageModel.model_validate(known | {"trained": trained, "state": kept * FLOAT})


def page(text: str, results: Mapping[str, Result]) -> str:
    """The page with all that stands between its markers made anew."""
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"the page has no {BEGIN} … {END}"
    counted = stages()
    photographs = results[NAME]
    tables = [compute(counted), loader(counted, photographs), network(counted), states(counted, results)]
    tables += [running(results["overhead"])] if "overhead" in results else []
    tables += [shown(each) for each in records()] + [sources(results)]
    return f"{before}{BEGIN}\n\n" + "\n\n".join(tables) + f"\n\n{END}{after}"


def compute(counted: Iterable[StageModel]) -> str:
    """Images a second."""
    heads = ["Recipe, stage", "GFLOP an image and step"]
    heads += [f"images/s of one A100 at {100 * share:.0f} %" for share in UTILISATION]
    heads += [f"of {GPUS} at {100 * share:.0f} %" for share in UTILISATION]
    rows = [
        [
            f"{one.recipe}, {one.stage}",
            f"{one.flops / 1e9:,.1f}",
            *(_three(one.rate(share)) for share in UTILISATION),
            *(_three(GPUS * one.rate(share)) for share in UTILISATION),
        ]
        for one in counted
    ]
    return "### What the GPUs compute\n\n" + _table(heads, rows)


def loader(counted: Iterable[StageModel], photographs: Result) -> str:
    """Cores and bytes a second, for the stages of photographs."""
    heads = ["Recipe, stage", "Images/s of 8 at 40 %"]
    heads += [f"cores for 8, {mode}" for mode in MODES] + [f"MB/s to read, {mode}" for mode in MODES]
    rows = []
    for one in counted:
        if one.recipe.startswith("imagenet"):
            rate = GPUS * one.rate(UTILISATION[-1])
            cores = [_three(rate * core_seconds(photographs, mode)) for mode in MODES]
            reads = [_three(rate * photographs.sizes[mode] / 1e6) for mode in MODES]
            rows.append([f"{one.recipe}, {one.stage}", _three(rate), *cores, *reads])
    each = "; ".join(
        f"{mode}: {1000 * core_seconds(photographs, mode):.2f} CPU ms and {photographs.sizes[mode] / 1000:.0f} KB an "
        f"image, {IMAGENET * photographs.sizes[mode] / 1e9:,.0f} GB for all of ImageNet"
        for mode in MODES
    )
    return f"### What the loader needs\n\nMeasured, for crops of 224 × 224: {each}.\n\n" + _table(heads, rows)


def core_seconds(photographs: Result, mode: str) -> float:
    """CPU seconds of an image."""
    return median(photographs.seconds[mode]) / photographs.images


def network(counted: Iterable[StageModel]) -> str:
    """Time of adding up gradients, and its share of a step, if nothing of it is hidden behind the computing."""
    heads = ["Recipe, stage", "MB of gradients a step"]
    heads += [f"{name}: ms a step, share" for name in LINKS]
    rows = []
    for one in counted:
        row = [f"{one.recipe}, {one.stage}", _three(one.trained * FLOAT / 1e6)]
        for workers, bandwidth in LINKS.values():
            adding = 2 * (workers - 1) / workers * one.trained * FLOAT / bandwidth
            computing = one.batch / workers / one.rate(UTILISATION[-1])
            row.append(f"{_three(1000 * adding)}, {100 * adding / (adding + computing):.0f} %")
        rows.append(row)
    return "### What the network needs\n\n" + _table(heads, rows)


def states(counted: Iterable[StageModel], results: Mapping[str, Result]) -> str:
    """Bytes of a state, and the seconds that it takes."""
    rows = [[f"{one.recipe}, {one.stage}", _three(one.state / 1e6)] for one in counted]
    text = "### What the states take\n\n" + _table(["Recipe, stage", "MB a state"], rows)
    overhead = results.get("overhead")
    if overhead is None or not overhead.numbers:
        return text
    size = next(one.state for one in counted if (one.recipe, one.stage) == ("cifar10-resnet18", "encoder"))
    writing, held = (overhead.numbers[f"{what} a state s"] for what in ("writing", "held up by"))
    return text + (
        f"\n\nMeasured, with resnet18-cifar's {size / 1e6:.0f} MB on a local disk: {writing:.2f} s to write and hash a "
        f"state beside the training ({size / writing / 1e6:,.0f} MB/s), which it holds up for {held:.3f} s."
    )


def running(overhead: Result) -> str:
    """What running properly costs over the bare loop."""
    found = ratios(overhead, overhead.comparisons[0])
    said = f"{median(found):.3f} ({min(found):.3f} – {max(found):.3f}) times the CPU seconds of the bare loop"
    return f"### What Ray Train, states and MLflow cost\n\n{overhead.about} Measured: {said}, n = {len(found)} rounds."


def records() -> list[Scaling]:
    """What `python -m benchmarks.scaling` measured, of what is kept."""
    paths = sorted((FOLDER / "results" / "scaling").glob("*.json"))
    return [Scaling.model_validate_json(path.read_text()) for path in paths]


def shown(record: Scaling) -> str:
    """One record of scaling: rates, efficiencies, checks."""
    name = yaml.safe_load(record.recipe)["name"].rpartition("/")[2]
    heads = ["Kind, stage", "workers", "batch", "images/s", "of perfect", "waiting for the loader", "ms a step"]
    rows = [
        [
            f"{run.kind}, {stage}",
            str(run.workers),
            str(one.batch),
            _three(one.images_per_s),
            f"{efficiency(record, run.kind, run, stage):.2f}",
            f"{100 * one.wait_share:.1f} %",
            _three(1000 * one.step_s),
        ]
        for run in record.runs
        for stage, one in run.stages.items()
    ]
    first = next(iter(record.runs[0].stages.values()))
    groups = [
        f"{timing.backend}, {timing.workers} workers, {timing.bytes / 2**20:g} MiB: {timing.bus / 1e9:.2f} GB/s"
        for group in record.groups
        if len(group.places) > 1
        for timing in group.timings
    ]
    failed = [f"{check.name}: {check.said}" for check in record.checks if not check.passed]
    said = f"{len(record.checks) - len(failed)} of {len(record.checks)} checks passed"
    said += f"; not: {'; '.join(failed)}." if failed else "."
    about = f"{record.steps} steps of each stage, {first.precision}, {first.device}; `{record.git}`, {record.time}."
    lines = [f"### Measured scaling: {name}", about, _table(heads, rows), f"`all_reduce`: {'; '.join(groups)}.", said]
    return "\n\n".join(lines)


def sources(results: Mapping[str, Result]) -> str:
    """Where the measured numbers are from."""
    used = [name for name in (NAME, "overhead") if name in results]
    return "\n".join(
        f"From `benchmarks/results/{name}.json`: {one.hardware['device']}, `{one.git}`, {one.time}."
        for name, one in ((name, results[name]) for name in used)
    )


def _table(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))


def _three(value: float) -> str:
    """Three significant digits."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:g}"


def main() -> None:
    """Make the page's tables anew, and keep what was counted for them."""
    document = [one.model_dump(mode="json") for one in stages()]
    write_text(COUNTED, json.dumps(document, indent=1) + "\n")
    write_text(PAGE, page(PAGE.read_text(), {each.name: each for each in read()}))


if __name__ == "__main__":
    main()
