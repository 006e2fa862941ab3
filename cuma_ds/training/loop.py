"""The only loop: learn, log, save, and what happens when a number is not finite or somebody says stop.

Shapes: R routers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cuma_ds.config import RunConfig
from cuma_ds.errors import CumaError
from cuma_ds.incident import doing
from cuma_ds.learned_settings import fingerprint
from cuma_ds.parallel.checkpoint import load_checkpoint, save_checkpoint
from cuma_ds.parallel.engine import AdapterEngine
from cuma_ds.parallel.stored import State, find_checkpoint, read_beside, stored_steps
from cuma_ds.parallel.watch import finishing_steps, stopped
from cuma_ds.runs import Run
from cuma_ds.telemetry.throughput import Throughput
from cuma_ds.telemetry.writer import MetricsWriter
from cuma_ds.training.health import Health
from cuma_ds.training.inputs import TrainingInputs
from cuma_ds.training.nonfinite import find_cause
from cuma_ds.training.step import StepResult, run_step

Say = Callable[[str], None]
# Steps that may be left out one after another before a run is given up: what is broken then is no single batch.
_MOST_LEFT_OUT = 10


def agreed_error(message: str) -> CumaError:
    """An error that every rank raises at the same place."""
    error = CumaError(message)
    error.printed_by_main = True
    return error


class Loop:
    """The steps of a run; all ranks go through it together.

    Args:
        config: the recipe.
        engine: as the first step finds it.
        inputs: batches and objective.
        tell: prints a line on the main rank.
    """

    def __init__(self, config: RunConfig, engine: AdapterEngine, inputs: TrainingInputs, tell: Say) -> None:
        self._config, self._engine, self._inputs, self._tell = config, engine, inputs, tell
        self._run, self._topology = Run(config.run_dir), engine.topology
        self._identity, self._throughput = self._run.identity(), Throughput(engine.topology.device)
        self._health = Health(engine.model.router_names, config.adapters.active_experts, tell)
        # A checkpoint lies between two rollouts.
        self._between = config.grpo.iterations if config.grpo is not None else 1
        self._left_out: set[int] = set()
        self._faults = 0
        self._saved = 0

    def run(self, steps: range) -> Path:
        """Take all steps, from ``steps.start`` that are done to ``steps.stop``; the last checkpoint.

        Raises:
            Stopped: a rank was told to stop; a checkpoint has been written.
            CumaError: of all ranks. What was learned so far is kept where it can be.
        """
        self._saved, step = steps.start, steps.start
        writer = MetricsWriter(
            self._run.metrics, self._run.tensorboard, self._config.telemetry, self._topology.is_main, steps
        )
        with writer, finishing_steps():
            self._inputs.objective.show = writer.show
            while step < steps.stop:
                doing(f"step {step + 1}")
                step = self._one(step, steps.stop, writer)
        return find_checkpoint(self._run.checkpoints, steps.stop)

    def _one(self, step: int, last: int, writer: MetricsWriter) -> int:
        """Take a step (from 0); the step to take next."""
        done, every, result = step + 1, self._config.checkpoint.every, None
        if step not in self._left_out:
            try:
                result = run_step(self._config, self._engine, self._inputs, step)
            except CumaError as error:
                if error.printed_by_main:  # of all ranks, e.g. because a judge is down
                    self._keep(step)
                raise
        if result is not None and result.fault is not None:
            back_at = self._after_fault(step, result.fault)
            if back_at is not None:
                writer.drop_after(back_at)
                return back_at
        elif result is not None:
            self._throughput.add(result.tokens, result.people)
            self._faults = 0
            self._health.add_loss(done, result.loss)
            if writer.is_due(done):
                self._log(writer, done, result)
        writer.advance(done)
        stops = result is not None and result.stopping and done % self._between == 0
        if done == last or (every > 0 and done % every == 0) or stops:
            self._save(done)
        if stops and done < last:
            raise stopped(f"after step {done} of {last}; the same command goes on from there")
        return done

    def _after_fault(self, step: int, fault: str) -> int | None:
        """Do what ``training.on_nonfinite`` says about a step whose numbers are not finite; where to go on, or None for
        the next step.
        """
        cause, policy = find_cause(self._engine, self._inputs, self._config, step, fault), self._policy(fault)
        self._faults += 1
        what = f"step {step + 1}: {cause}"
        if policy == "stop" or step in self._left_out or self._faults > _MOST_LEFT_OUT:
            if fault != "update":
                self._keep(step)
            many = f" ({self._faults} steps one after another)" if self._faults > 1 else ""
            raise agreed_error(f"{what}{many}; {_ADVICE[fault]}")
        if policy == "skip":
            self._tell(f"warning: {what}; nothing is learned from this step (training.on_nonfinite: skip)")
            self._health.nonfinite_steps += 1
            return None
        newest = find_checkpoint(self._run.checkpoints)
        back_at = load_checkpoint(self._engine, newest)
        self._inputs.objective.load_state(read_beside(newest))
        self._left_out |= set(range(step - step % self._between, step - step % self._between + self._between))
        self._health.nonfinite_steps += 1
        self._tell(
            f"warning: {what}; going back to {newest.name}, and leaving step {step + 1} out "
            "(training.on_nonfinite: rollback)"
        )
        return back_at

    def _policy(self, fault: str) -> str:
        """What can be done: an update that broke the parameters cannot be left out afterwards, and going back needs a
        checkpoint.
        """
        policy, checkpoints = self._config.training.on_nonfinite, self._run.checkpoints
        if (policy == "skip" and fault == "update") or (policy == "rollback" and not stored_steps(checkpoints)):
            return "stop"
        return policy

    def _keep(self, step: int) -> None:
        """Save what is not saved yet, after ``step`` steps, where a checkpoint may lie."""
        if step > self._saved and step % self._between == 0:
            self._save(step)

    def _save(self, done: int) -> None:
        state: State = {"step": done, "fingerprint": fingerprint(self._config), "identity": self._identity}
        beside = self._inputs.objective.state()
        save_checkpoint(self._engine, self._run.checkpoints, state, self._config.checkpoint, beside)
        self._saved = done

    def _log(self, writer: MetricsWriter, step: int, result: StepResult) -> None:
        """Write the row of one step, counted from 1."""
        sums, engine = dict(result.sums), self._engine
        load_RE, entropy_R, routed = (sums.pop(name, None) for name in ("load_RE", "entropy_R", "routed"))
        balance = sums.pop("balance", 0.0) / engine.topology.world
        scalars = {name: float(value) / result.weight for name, value in sums.items()}
        means = {name: value.tolist() for name, value in result.means.items()}
        scalars |= {name: total / number for name, (total, number) in means.items() if number}
        scalars |= {"lr": result.rate, "grad_norm": engine.grad_norm}
        scalars |= {**self._throughput.row(), **self._inputs.objective.report()}
        if load_RE is not None:
            scalars["balance"] = float(balance)
            self._health.add_load(step, load_RE)
        if engine.loss_scaler is not None:
            scalars["loss_scale"] = float(engine.loss_scaler.loss_scale)
        scalars |= {f"bytes_sent/{name}": float(count) for name, count in result.bytes_sent.items()}
        scalars |= self._health.row()
        writer.log(step, scalars)
        if load_RE is not None and entropy_R is not None and routed is not None:
            share_RE = load_RE / load_RE.sum(dim=1, keepdim=True).clamp(min=1)
            writer.log_routing(step, engine.model.router_names, share_RE, entropy_R / routed.clamp(min=1))


_ADVICE = {
    "loss": "mend what is named, or go on without such steps with training.on_nonfinite: skip",
    "gradient": "lower training.learning_rate or try model.dtype float32, or go on without such steps with "
    "training.on_nonfinite: skip",
    "update": "lower training.learning_rate or weight_decay, or raise adam_eps, or go back to the last checkpoint and "
    "leave the step out with training.on_nonfinite: rollback",
}
