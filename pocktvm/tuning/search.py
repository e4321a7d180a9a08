"""MetaSchedule over a rule's knobs: TVM's search, our loop nests.

The design space of a task is a canonical kernel with one annotation a knob, each sampled by
MetaSchedule; a builder reads the annotations and compiles the kernel the rule emits for them. The
evolutionary search asks a cost model (XGBoost over the knobs) which of many sampled points to
measure. Every measurement goes to a journal before the search sees it, so a search that is killed
goes on where it was, without measuring anything twice.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pocktvm.schedule.rule import Knob, Rule, Task, defaults
from pocktvm.tuning.candidate import build_candidate
from pocktvm.tuning.runners import CandidateError, Runner
from pocktvm.tvm_api import IRModule, Schedule, meta_schedule, te, tvm_target

PREFIX = "pocktvm."
FAILED = 1e9


@dataclass
class Journal:
    """Measured points of one task, a JSON line each; survives the process."""

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    point = json.loads(line)
                except ValueError:
                    continue  # the line being written when the process was killed
                self.seconds[point["knobs"]] = point["seconds"]

    def add(self, knobs: str, seconds: float) -> None:
        """Append a measured point to the file."""
        self.seconds[knobs] = seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"knobs": knobs, "seconds": seconds}) + "\n")


@dataclass
class Measured:
    """Builds and times points of one task for MetaSchedule."""

    task: Task
    rule: Rule
    runner: Runner
    journal: Journal
    progress: Callable[[int, float, float], None]
    deadline: float
    scratch: Path
    _count: int = 0

    def measure(self, knobs: Mapping[str, Any]) -> float:
        """Seconds of a point, FAILED for one that cannot be built, crashes or is wrong."""
        text = json.dumps(dict(knobs), sort_keys=True)
        if text not in self.journal.seconds:
            if time.monotonic() > self.deadline:
                return FAILED
            self.journal.add(text, self._run(knobs))
        self._count += 1
        best = min(self.journal.seconds.values())
        self.progress(self._count, self.journal.seconds[text], best)
        return self.journal.seconds[text]

    def _run(self, knobs: Mapping[str, Any]) -> float:
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        try:
            build_candidate(self.task, self.rule, knobs, folder)
            return self.runner.time(folder)
        except CandidateError:
            return FAILED
        except Exception:  # a rule may refuse a combination of knobs; the search goes on
            return FAILED
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def space_size(knobs: Mapping[str, Knob]) -> int:
    """How many points the knobs span."""
    size = 1
    for knob in knobs.values():
        size *= len(knob.options)
    return size


def search(measured: Measured, trials: int, seed: int = 0) -> None:
    """Measure about `trials` points; the results are in the journal.

    A space no larger than `trials` is measured whole; else MetaSchedule's evolutionary search with
    the cost model chooses, or its random replay when the cost model's library is missing.
    """
    knobs = measured.rule.knobs(measured.task)
    if space_size(knobs) <= trials:
        for point in _all_points(knobs):
            measured.measure(point)
        return
    ms = meta_schedule()
    target = tvm_target(measured.task.target.tvm)
    space = ms.space_generator.ScheduleFn(
        lambda schedule: _sample(schedule, knobs), sch_rules=[], postprocs=[], mutator_probs={}
    )
    model, strategy = _cost_model(ms, knobs)
    with tempfile.TemporaryDirectory(prefix="pocktvm-tune-") as work:
        ms.tir_integration.tune_tir(
            _canonical(),
            target,
            work,
            trials,
            num_trials_per_iter=min(8, trials),
            builder=_builder(ms),
            runner=_runner(ms, measured),
            cost_model=model,
            measure_callbacks=[ms.measure_callback.AddToDatabase(),
                               ms.measure_callback.UpdateCostModel()],
            space=space,
            strategy=strategy,
            num_tuning_cores=1,
            seed=seed + 1,
        )  # fmt: skip


def _all_points(knobs: Mapping[str, Knob]) -> list[dict[str, Any]]:
    points: list[dict[str, Any]] = [{}]
    for name, knob in knobs.items():
        points = [{**p, name: option} for p in points for option in knob.options]
    return points


def _canonical() -> IRModule:
    """A kernel with one block to hang the knobs on; it is never compiled."""

    source = te.placeholder((1,), name="source")
    copied = te.compute((1,), lambda i: source[i], name="C")
    return IRModule({"main": te.create_prim_func([source, copied])})


def _sample(schedule: Any, knobs: Mapping[str, Knob]) -> None:
    block = schedule.get_sblock("C")
    for name, knob in knobs.items():
        count = len(knob.options)
        choice = schedule.sample_categorical(list(range(count)), [1.0 / count] * count)
        schedule.annotate(block, PREFIX + name, choice)


def choices(module: Any) -> dict[str, int]:
    """The option index of every knob, read from a sampled module's annotations."""
    schedule = Schedule(module)
    annotations = schedule.get(schedule.get_sblock("C")).annotations
    return {
        str(k).removeprefix(PREFIX): int(v)
        for k, v in annotations.items()
        if str(k).startswith(PREFIX)
    }


def _builder(ms: Any) -> Any:
    """A builder that only notes the choices: candidates are built where they are measured."""

    @ms.utils.derived_object
    class KnobBuilder(ms.builder.PyBuilder):
        def build(self, build_inputs: list[Any]) -> list[Any]:
            results = []
            for item in build_inputs:
                folder = tempfile.mkdtemp(prefix="pocktvm-point-")  # removed by its callback
                path = Path(folder) / "choices.json"
                path.write_text(json.dumps(choices(item.mod)))
                results.append(ms.builder.BuilderResult(str(path), None))
            return results

    return KnobBuilder()


def _runner(ms: Any, measured: Measured) -> Any:
    @ms.utils.derived_object
    class Done(ms.runner.PyRunnerFuture):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def done(self) -> bool:
            return True

        def result(self) -> Any:
            if self.seconds >= FAILED:
                return ms.runner.RunnerResult(None, "failed")
            return ms.runner.RunnerResult([self.seconds], None)

    @ms.utils.derived_object
    class KnobRunner(ms.runner.PyRunner):
        def run(self, runner_inputs: list[Any]) -> list[Any]:
            knobs = measured.rule.knobs(measured.task)
            futures = []
            for item in runner_inputs:
                path = Path(str(item.artifact_path))
                chosen = json.loads(path.read_text())
                shutil.rmtree(path.parent, ignore_errors=True)
                point = {name: knobs[name].options[i] for name, i in chosen.items()}
                futures.append(Done(measured.measure(point)))
            return futures

    return KnobRunner()


def _cost_model(ms: Any, knobs: Mapping[str, Knob]) -> tuple[Any, str]:
    """(cost model, strategy): XGBoost over one-hot knobs; random replay without XGBoost."""
    try:
        import xgboost
    except ImportError:
        return "random", "replay-trace"

    @ms.utils.derived_object
    class KnobModel(ms.cost_model.PyCostModel):
        def __init__(self) -> None:
            super().__init__()
            self.rows: list[list[float]] = []
            self.scores: list[float] = []
            self.model: Any = None

        def load(self, path: str) -> None:
            """Nothing: the journal is what persists."""

        def save(self, path: str) -> None:
            """Nothing: the journal is what persists."""

        def update(self, context: Any, candidates: list[Any], results: list[Any]) -> None:
            for candidate, result in zip(candidates, results, strict=True):
                seconds = list(result.run_secs or [])
                self.rows.append(_one_hot(candidate, knobs))
                self.scores.append(1.0 / float(seconds[0]) if seconds else 0.0)
            best = max(self.scores) or 1.0
            data = xgboost.DMatrix(np.array(self.rows), label=np.array(self.scores) / best)
            self.model = xgboost.train({"max_depth": 5, "nthread": 1}, data, 40)

        def predict(self, context: Any, candidates: list[Any]) -> np.ndarray:
            if self.model is None:
                return np.random.default_rng(0).random(len(candidates))
            rows = np.array([_one_hot(c, knobs) for c in candidates])
            return np.asarray(self.model.predict(xgboost.DMatrix(rows)), dtype=np.float64)

    return KnobModel(), "evolutionary"


def _one_hot(candidate: Any, knobs: Mapping[str, Knob]) -> list[float]:
    chosen = choices(candidate.sch.mod)
    return [
        1.0 if chosen[name] == index else 0.0
        for name, knob in knobs.items()
        for index in range(len(knob.options))
    ]


__all__ = ["FAILED", "Journal", "Measured", "defaults", "search", "space_size"]
