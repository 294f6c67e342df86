"""What the estimators share: an ensemble of any method over scaled feature vectors."""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from rich.progress import Progress
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted, check_random_state
from torch import Generator, Tensor, nn

from mmfusion import layers
from mmfusion.recipes import checkpoint
from mmfusion.recipes.batches import seeded
from mmfusion.recipes.crossfit import crossfit, folds
from mmfusion.recipes.features import FeatureScaler, as_tensors, columns_of, read
from mmfusion.recipes.given_rows import group_numbers, refuse_other_order, refuse_overflow
from mmfusion.recipes.member_training import train
from mmfusion.recipes.members import Features, Member, Rows, build
from mmfusion.recipes.settings import check_settings


class RowExplanation(NamedTuple):
    """Why rows got their prediction; see ``explain``.

    Attributes:
        present: ``(rows, M)`` bool, what was used; the rest was synthesised or left out.
        evidence: ``(rows, M, Y)``, what each modality adds to the score of each class on its own,
            as weighted in the mixture; None without evidence.
        neighbour_ids: ``(members, rows, M, L, K)``, the training rows that memory lent from, by
            their place in ``fit``; -1 where none. None without a ``MemoryBank``.
        neighbour_weights: As ``neighbour_ids``: how much each lent.
    """

    present: np.ndarray
    evidence: np.ndarray | None
    neighbour_ids: np.ndarray | None
    neighbour_weights: np.ndarray | None


class Ensemble(BaseEstimator):  # type: ignore[misc]
    """What classifier and regressor share; scikit-learn finds the arguments in ``__init__``."""

    def __init__(
        self,
        method: str = "cmml",
        *,
        dim: int = 64,
        num_members: int = 5,
        epochs: int = 60,
        learning_rate: float = 4e-3,
        hide_rate: float = 0.5,
        dropout: float = 0.3,
        input_dropout: float = 0.2,
        num_components: int | None = 64,
        shallow: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = 0,
        progress: bool = True,
    ) -> None:
        self.method = method
        self.dim = dim
        self.num_members = num_members
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.hide_rate = hide_rate
        self.dropout = dropout
        self.input_dropout = input_dropout
        self.num_components = num_components
        self.shallow = shallow
        self.options = options
        self.device = device
        self.random_state = random_state
        self.progress = progress

    def fit(
        self,
        inputs: Mapping[str, Any],
        y: Any,
        present: Any = None,
        groups: Any = None,
    ) -> Self:
        """Train the ensemble, and decide its mixture on the rows each member left out.

        Args:
            inputs: Modality name to ``(rows, features)``: array, frame or tensor. A row that is NaN
                throughout is absent.
            y: Targets, one row each.
            present: ``(rows, M)`` bool; None infers it from NaN rows.
            groups: One value per row; rows of one group are never on both sides of a fold.
        """
        before = dict(self.__dict__)
        try:
            self._fit(inputs, y, present, groups)
        except BaseException:  # refused, or stopped: what was fitted before stays whole
            self.__dict__ = before
            raise
        return self

    def _fit(self, inputs: Mapping[str, Any], y: Any, present: Any, groups: Any) -> None:
        check_settings(self.get_params(deep=False))
        values = as_tensors(inputs, tuple(inputs))
        self.widths_ = {n: x.shape[1] for n, x in values.items() if x is not None}
        self.columns_ = columns_of(inputs)
        if not self.widths_:
            raise ValueError(
                "inputs holds no modality: there is at least one. Pass a dict of arrays."
            )
        if len(self.widths_) < len(values):
            lacking = next(name for name, x in values.items() if x is None)
            raise ValueError(
                f"inputs[{lacking!r}] is None: a modality without a single row cannot be learned. "
                "Leave it out of fit."
            )
        refuse_other_order(inputs, y=y, present=present, groups=groups)
        tensors, seen = self._read(inputs, present)
        labels = self._encode_targets(y)
        if not len(labels) == len(seen) >= 2 * self.num_members:
            raise ValueError(
                f"{len(labels)} targets for {len(seen)} rows with num_members={self.num_members}: "
                "each row has a target, and each member leaves out at least two rows. Pass as many "
                "targets as rows, or lower num_members."
            )
        self.scaler_ = FeatureScaler(self.widths_, self.num_components).fit(tensors, seen)
        numbers = None if groups is None else group_numbers(groups, len(seen))
        rows = Rows(self._features(tensors), seen, labels, numbers)
        seed = self._seed()
        self.params_ = self.get_params(deep=False) | {"random_state": seed}
        parts = folds(rows, self.num_members, self.target_, seed)
        self.num_rows_ = [len(kept) for kept, _ in parts]
        device = self._device()
        self.members_ = []
        with self._bar(self.num_members * self.epochs) as advance:
            for number, (kept, _) in enumerate(parts):
                with seeded(seed * 1000 + number, device):
                    member = self._build(len(kept)).to(device)
                    train(
                        member.model,
                        rows,
                        kept,
                        epochs=self.epochs,
                        learning_rate=self.learning_rate,
                        hide_rate=self.hide_rate,
                        input_dropout=self.input_dropout,
                        generator=Generator().manual_seed(seed * 1000 + number),
                        after_epoch=advance,
                    )
                self.members_.append(member)
        self.decisions_ = crossfit(
            self.members_, rows, parts, self.hide_rate, self.input_dropout, seed
        )

    def _build(self, num_rows: int) -> Member:
        targets = {"num_outputs": self.num_outputs_, "target": self.target_}
        return build(
            str(self.method),
            self.scaler_.out_widths,
            **targets,
            dim=self.dim,
            dropout=self.dropout,
            num_slots=num_rows,
            num_neighbours=min(self.num_rows_),
            shallow=self.shallow,
            options=self.options or {},
        )

    def _read(self, inputs: Mapping[str, Any], present: Any) -> tuple[dict[str, Tensor], Tensor]:
        return read(inputs, present, self.widths_, self.columns_)

    def _features(self, tensors: Mapping[str, Tensor]) -> Features:
        columns = self.scaler_.standardised(tensors)
        return Features(columns, self.scaler_.project(columns))

    def _seed(self) -> int:
        if self.random_state is None or isinstance(self.random_state, np.random.RandomState):
            return int(check_random_state(self.random_state).randint(2**20))
        return int(self.random_state)

    def _device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    @contextlib.contextmanager
    def _bar(self, total: int) -> Iterator[Any]:
        with Progress(disable=not self.progress, transient=True) as bar:
            task = bar.add_task(f"{self.method}: training", total=total)
            yield lambda: bar.advance(task)

    @torch.no_grad()
    def _over_members(self, inputs: Mapping[str, Any], present: Any, ask: Any) -> list[Tensor]:
        """What each member answers, on the CPU."""
        check_is_fitted(self, "members_")
        refuse_other_order(inputs, present=present)
        tensors, seen = self._read(inputs, present)
        features, answers = self._features(tensors), []
        for member in self.members_:
            move = functools.partial(Tensor.to, device=member.weights.device)
            answers.append(ask(member, features.each(move), move(seen)).cpu())
            refuse_overflow(answers[-1], features.columns)
        return answers

    def _predicted(self, inputs: Mapping[str, Any], present: Any) -> np.ndarray:
        each = self._over_members(inputs, present, Member.__call__)
        return torch.stack(each).mean(0).numpy()

    def transform(self, inputs: Mapping[str, Any], present: Any = None) -> np.ndarray:
        """The fused vectors of all members side by side, ``(rows, members * dim)``."""
        each = self._over_members(
            inputs, present, lambda member, x, seen: member.model(x.scaled, present=seen).fused
        )
        return torch.cat(each, dim=1).numpy()

    def synthesise(self, inputs: Mapping[str, Any], present: Any = None) -> dict[str, np.ndarray]:
        """Each modality's representation, synthesised where absent: ``(rows, members * dim)``.

        Raises:
            ValueError: If the method synthesises nothing.
        """

        def ask(member: Member, x: Features, seen: Tensor) -> Tensor:
            out = member.model(x.scaled, present=seen)
            if out.synthesised is None:
                raise ValueError(
                    f"method={self.method!r} synthesises nothing: only a method that guesses what "
                    "is absent can show its guess. Use CMML, CascadeAutoencoder, SharedSpecific or "
                    "RetrieveAndFill."
                )
            return out.completed.mean(2)

        found = torch.cat(self._over_members(inputs, present, ask), dim=2)  # (B, M, members * D)
        return {name: found[:, m].numpy() for m, name in enumerate(self.widths_)}

    def explain(self, inputs: Mapping[str, Any], present: Any = None) -> RowExplanation:
        """What was used, what each modality says on its own, and which training rows were lent."""
        check_is_fitted(self, "members_")
        seen = self._read(inputs, present)[1]
        # Prototypes are nobody's rows.
        remembers = isinstance(getattr(self.members_[0].model, "memory", None), layers.MemoryBank)

        def ask(what: str) -> np.ndarray:
            def of(member: Member, x: Features, seen: Tensor) -> Tensor:
                return getattr(member.model(x.scaled, present=seen), what)

            return torch.stack(self._over_members(inputs, present, of)).numpy()

        evidence = None
        if len(self.members_[0].kinds) > 1:
            parts = self._over_members(inputs, present, Member.parts)
            evidence = torch.stack(parts).mean(0).numpy()
        ids, weights = (
            map(ask, ("neighbour_ids", "neighbour_weights")) if remembers else (None,) * 2
        )
        return RowExplanation(seen.numpy(), evidence, ids, weights)

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, whole or not at all; ``load`` reads it.

        Raises:
            ValueError: If ``options`` holds a module (a file keeps plain values), or ``path`` is no
                file in a folder that exists.
        """
        check_is_fitted(self, "members_")
        for name, option in (self.params_["options"] or {}).items():
            if isinstance(option, nn.Module):
                raise ValueError(
                    f"options[{name!r}] is a {type(option).__name__}: a file keeps the arguments "
                    "of fit as plain values. Pickle the estimator instead."
                )
        about = {name: getattr(self, name) for name in ("columns_", *self._KEPT)}
        params = {n: x.item() if isinstance(x, np.generic) else x for n, x in self.params_.items()}
        about |= {"class": type(self).__name__, "params": params}
        checkpoint.save(_file(path), self._parts().state_dict(), about)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A fitted estimator from what ``save`` wrote.

        Raises:
            ValueError: If the file is not there, or holds something else.
        """
        path = _file(path)
        if not path.exists():
            raise ValueError(f"{path} is not there: load reads what save wrote. Correct the path.")
        tensors, about = checkpoint.load(path)
        if about.get("class") != cls.__name__:
            raise ValueError(
                f"{path} holds a {about.get('class', 'training state')}: {cls.__name__}.load reads "
                f"what a {cls.__name__} saved. Load it with the class that wrote it."
            )
        made = cls(**about["params"])
        for name in ("columns_", *cls._KEPT):
            setattr(made, name, about[name])
        made.params_ = about["params"]
        made.scaler_ = FeatureScaler(made.widths_, made.num_components)
        device = made._device()
        with torch.random.fork_rng(devices=[]):  # what is drawn is overwritten
            made.members_ = [made._build(n).to(device).eval() for n in made.num_rows_]
        made._parts().load_state_dict(tensors)
        return made

    def _parts(self) -> nn.Module:
        """All that was fitted."""
        return nn.ModuleDict({"scaler": self.scaler_, "members": nn.ModuleList(self.members_)})


def _file(path: str | Path) -> Path:
    """Where a file can be; ``~`` is the home of the user."""
    found = Path(path).expanduser()
    if not found.name or found.is_dir() or not found.parent.is_dir():
        raise ValueError(
            f"path={str(path)!r}: it is a file, in a folder that exists. Pass one such as "
            "model.safetensors, or make the folder."
        )
    return found
