"""The training loop: optimizer steps over global batches of packed rows, evaluation, and what is reported of both."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steps.engine.data.batches import MicroBatch, Order, read, shares
from steps.engine.data.shards import PackedSplit
from steps.engine.progress import Progress
from steps.engine.train.compiling import warm_up
from steps.engine.train.distributed import World
from steps.engine.train.loss import batch_loss
from steps.engine.train.optim import AdamW, Gradients, clip
from steps.engine.train.plan import Plan
from steps.engine.train.saving import Position
from steps.engine.train.schedule import learning_rate
from steps.engine.train.trained import Trained
from steps.errors import Problem, StepFailed


@dataclass
class Trainer:
    """One run in one process. `run` is the only method with effects outside of what is trained and the optimizer."""

    plan: Plan
    trained: Trained
    optimizer: AdamW
    train_split: PackedSplit
    valid_split: PackedSplit
    world: World
    progress: Progress

    def __post_init__(self) -> None:
        self._gradients = Gradients(self.trained.parameters())
        self._order = Order(len(self.train_split), self.plan.rng.seed)
        self._tokens, self._seconds = 0.0, 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Over all optimizer steps taken here and all processes, evaluations and saves left out; None before any."""
        return self._tokens / self._seconds if self._seconds else None

    def run(self, position: Position, save: Callable[[Position], None]) -> None:
        """Train from `position` to train_iters, moving `position` along; `save` is called when it is time to.

        Raises StepFailed (`non_finite_loss`, `no_trained_tokens`) before such a step changes anything.
        """
        train = self.plan.train
        self._warm_up(position)
        if position.iteration == 0:
            self._report_evaluation(position)
        with self.progress.task("train", train.train_iters, "steps", start=position.iteration) as task:
            while position.iteration < train.train_iters:
                row = self._step(position)
                position.history.setdefault("loss_first", row["loss"])
                position.history["loss_last"] = row["loss"]
                self.progress.metrics(row)
                task.advance(1, loss=row["loss"], tokens_per_second=row["tokens_per_second"])
                last = position.iteration == train.train_iters
                if position.iteration % train.log_interval == 0 or last:
                    self.progress.log(_line(row, train.train_iters))
                if last or (train.eval_interval and position.iteration % train.eval_interval == 0):
                    self._report_evaluation(position)
                if last or position.iteration % self.plan.checkpoint.save_interval == 0:
                    self._check_weights(position.iteration)
                    save(position)

    def probe(self, steps: int) -> tuple[float, float]:
        """Take one optimizer step and then `steps` more; tokens/s over all processes and seconds a step, of these."""
        position, rows = Position(), []
        self._warm_up(position)
        with self.progress.task("probe", 1 + steps, "steps") as task:
            for _ in range(1 + steps):
                rows.append(self._step(position))
                task.advance(1, tokens_per_second=rows[-1]["tokens_per_second"])
        seconds = sum(row["seconds"] for row in rows[1:])
        return sum(row["tokens"] for row in rows[1:]) / seconds, seconds / steps

    def _warm_up(self, position: Position) -> None:
        warm_up(self.trained, self._read(self.train_split, [self._order[position.consumed_samples]]), self.progress)

    def _step(self, position: Position) -> dict[str, float]:
        """One optimizer step; moves `position` and returns its row of metrics."""
        began, plan = time.perf_counter(), self.plan
        iteration, first = position.iteration + 1, position.consumed_samples
        samples = range(first, first + plan.train.global_batch_size)
        lr = learning_rate(iteration, plan.optimizer, plan.scheduler, plan.train.train_iters)
        self.trained.decoder.train()
        self._gradients.zero()
        # Losses stay where they are until the last is asked for: a GPU is given the next batch before this one is done.
        sums, counts = self._zeros(3), torch.zeros(2, dtype=torch.float64)
        for share in shares(samples, plan.train.micro_batch_size, self.world.rank, self.world.size):
            # Dropout is a function of the data position, so that neither resuming nor more processes change it.
            torch.manual_seed(_seed(plan.rng.seed, share.start))
            batch = self._read(self.train_split, [self._order[sample] for sample in share])
            loss = batch_loss(self.trained.decoder, batch)
            if loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]
            sums[0] += loss.detach()
            counts += torch.tensor([len(batch.targets), len(batch.input_ids)])
        sums[1:] = counts
        loss_sum, trained, tokens = self.world.sum(sums).tolist()
        if not trained:
            raise _no_trained_tokens(iteration, len(samples))
        for buffer in self._gradients.buffers:
            self.world.sum(buffer)
        self._gradients.scale(1 / trained)
        penalty = self.trained.penalty()
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]
        norm = self._gradients.norm()
        if not math.isfinite(loss_sum) or not math.isfinite(norm):
            raise _non_finite(iteration, loss_sum / trained, norm)
        clip(self._gradients, norm, plan.optimizer.clip_grad)
        self.optimizer.step(lr)
        self.trained.after_step(iteration, plan.train.train_iters)
        position.iteration, position.consumed_samples = iteration, samples.stop
        seconds = time.perf_counter() - began
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        return {
            "iteration": iteration, "loss": loss_sum / trained, "lr": lr, "grad_norm": norm, "tokens": int(tokens),
            "trained_tokens": int(trained), "tokens_per_second": tokens / seconds, "seconds": seconds,
        }  # fmt: skip

    def _check_weights(self, iteration: int) -> None:
        """What the last update did shows in no loss yet; it must not be saved over what is good."""
        for name, tensor in self.trained.tensors().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                what = f"the weights are not finite any more ({name}); they are not saved"
                raise StepFailed(
                    Problem(f"iteration {iteration}", what, hint="Try a lower optimizer.lr.", name="non_finite_loss")
                )

    def evaluate(self) -> float | None:
        """Mean loss over the trained tokens of the first eval_iters global batches of the valid split, in its order.

        None when there is nothing to evaluate.
        """
        train = self.plan.train
        rows = min(len(self.valid_split), train.eval_iters * train.global_batch_size)
        sums = self._zeros(2)
        self.trained.decoder.eval()
        with torch.no_grad():
            for share in shares(range(rows), train.micro_batch_size, self.world.rank, self.world.size):
                batch = self._read(self.valid_split, share)
                sums[0] += batch_loss(self.trained.decoder, batch)
                sums[1] += len(batch.targets)
        loss_sum, trained = self.world.sum(sums).tolist()
        return loss_sum / trained if trained else None

    def _report_evaluation(self, position: Position) -> None:
        loss = self.evaluate()
        if loss is not None:
            position.history.setdefault("valid_loss_first", loss)
            position.history["valid_loss_last"] = loss
            self.progress.metrics({"iteration": position.iteration, "valid_loss": loss})
            self.progress.log(f"iteration {position.iteration}: valid loss {loss:.4f}")

    def _read(self, split: PackedSplit, rows: Iterable[int]) -> MicroBatch:
        return read_known(split, list(rows), self.trained.decoder.config.vocab_size).to(self.world.device)

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64, device=self.world.device)


def read_known(split: PackedSplit, rows: Sequence[int], vocab_size: int) -> MicroBatch:
    """The micro-batch of these rows. Raises StepFailed tokenizer_mismatch for a token that the base does not know."""
    batch = read(split, rows)
    if int(batch.input_ids.max()) >= vocab_size or int(batch.input_ids.min()) < 0:
        raise StepFailed(
            f"the data hold token {int(batch.input_ids.max())}, but the base model knows {vocab_size} tokens",
            hint="Pack the data with the tokenizer of the base model.",
            name="tokenizer_mismatch",
        )
    return batch


def _seed(seed: int, sample: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:dropout:{sample}".encode()).digest()[:8], "big") >> 1


def _line(row: dict[str, float], train_iters: int) -> str:
    return (
        f"iteration {row['iteration']:.0f}/{train_iters}: loss {row['loss']:.4f}, lr {row['lr']:.3g}, "
        f"grad norm {row['grad_norm']:.3g}, {row['tokens_per_second']:,.0f} tokens/s"
    )


def _no_trained_tokens(iteration: int, packs: int) -> StepFailed:
    return StepFailed(
        f"iteration {iteration}: none of the {packs} packed rows has a trained token",
        hint="Look at loss_mask in the data: is the chat template's assistant part found?",
        name="no_trained_tokens",
    )


def _non_finite(iteration: int, loss: float, norm: float) -> StepFailed:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient norm is {norm} (loss {loss:.4f})"
    return StepFailed(
        Problem(
            where=f"iteration {iteration}",
            what=f"{what}; nothing was changed by this step",
            hint="Try a lower optimizer.lr, a warmup, or train.precision=float32.",
            name="non_finite_loss",
        )
    )
