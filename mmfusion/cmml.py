"""CMML, the whole model: every stage is a module that can be replaced or left out."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmfusion.layers import (
    CRTA,
    AbsentTokens,
    ConcatPool,
    ContextTokens,
    EvidenceOutput,
    FusionOutput,
    Head,
    MemoryBank,
    ModalityEncoders,
    ReferenceAlignment,
)
from mmfusion.layers.encoders import observe
from mmfusion.layers.reset import reset_children
from mmfusion.losses import (
    alignment_loss,
    check_labels,
    check_target,
    class_contrastive_loss,
    evidence_loss,
    is_known,
    reconstruction_loss,
    task_loss,
)
from mmfusion.reference import wide_type

__all__ = ["CMML", "Explanation"]


class Explanation(NamedTuple):
    """Why an output is what it is; see ``CMML.explain``.

    Attributes:
        synthesised: ``(B, M)`` bool, which modalities were guessed.
        neighbour_weights: ``(B, M, L, K)``, what memory lent to each token; None without memory.
        neighbour_ids: ``(B, M, L, K)``, the remembered samples it came from, or the numbers of the
            prototypes of a ``PrototypeMemory``; -1 where none.
        reference_weights: ``(B, C, M)``, how much each reference token reads from each modality;
            None without alignment.
    """

    synthesised: Tensor
    neighbour_weights: Tensor | None
    neighbour_ids: Tensor | None
    reference_weights: Tensor | None


class CMML(nn.Module):
    """Context-driven missing-modality learning: synthesise what is absent, align, classify.

    Takes any pattern of missing modalities, per sample. While training, hide observed ones with
    ``visible`` (see ``missingness.hide``): the reconstruction loss lives on what was hidden, so
    that incomplete training data works as it is. With ``sample_ids`` a training step reads the
    memory and then writes this batch's observed vectors to it; without ids nothing is written. Pass
    them in evaluation too when the rows are those of training, or a sample finds itself. Checkpoint
    activations inside encoders, not around this model: a recomputed forward would write twice.

    Args:
        modalities: Name to feature width, or to ``(encoder, width of what it returns)``. Their
            order is that of the columns of ``present``.
        num_classes: Outputs, ``Y``; 1 for ``"binary"``.
        target: ``"multiclass"``, ``"multilabel"``, ``"binary"`` or ``"regression"``.
        dim: Width of a token, ``D``.
        num_tokens: Tokens per modality, ``L``.
        num_heads: Attention heads, ``H``.
        num_context: Context tokens, ``C``.
        num_blocks: Blocks of the cascade.
        dropout: Dropout in cascade, alignment and head.
        crta: A ready ``CRTA``, or None: absent tokens are then learned constants.
        memory: A ready ``MemoryBank`` or ``PrototypeMemory``, or None. By default 512 slots per
            modality, of which 8 are read. A memory of your own has ``lookup``, ``gate`` and, to be
            written, ``write`` as ``MemoryBank`` has them.
        alignment: A ready ``ReferenceAlignment``, or None: ``aligned`` is then ``completed``.
        pool: A module from ``(aligned, present)`` to ``(B, D)``; None is a ``ConcatPool``.
        head: A module from ``(B, D)`` to ``(B, Y)``; None is a norm and a projection.
        evidence: A ``ModalityEvidence``, worth adding on few samples: it classifies each observed
            modality on its own, and ``logits`` is then the mean of what it and the fused vector
            say, in log-probabilities (log odds, predictions). Each has a loss of its own.
        reconstruction_weight: Weight of the synthesis loss in ``loss``.
        alignment_weight: Weight of the alignment loss.
        contrastive_weight: Weight of the class contrastive loss; unused for regression.
        check_values: Look for contradictions in inputs, labels and memory. It waits for a GPU.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Shape:
        - ``inputs[name]``: ``(B, ...)``; ``present``, ``visible``: ``(B, M)`` bool
        - ``labels``: ``(B,)`` or ``(B, Y)``; ``sample_ids``: ``(B,)`` int64
        - result: ``FusionOutput``

    Raises:
        ValueError: If sizes or targets contradict each other, or on what ``presence.normalise``
            refuses, a ``visible`` that is not a subset of ``present``, or labels out of range.

    Example:
        >>> model = CMML({"clinic": 8, "derm": 8, "meta": 3}, num_classes=5, dim=16)
        >>> inputs = {"clinic": torch.randn(4, 8), "derm": None, "meta": torch.randn(4, 3)}
        >>> out = model(inputs, labels=torch.tensor([0, 1, 2, -100]))
        >>> tuple(out.logits.shape), out.present[0].tolist()
        ((4, 5), [True, False, True])
        >>> sorted(out.losses)
        ['alignment', 'contrastive', 'reconstruction', 'task']

    References:
        Liu, Yu, Han, Wan, "Context-driven Missing-Modality Learning for Robust Medical Diagnosis
        with Image-Tabular Data", arXiv 2605.25968. Its abstract is all that is public to us: sizes,
        losses and everything the layers call so are our design.
    """

    def __init__(
        self,
        modalities: Mapping[str, int | tuple[nn.Module, int]],
        *,
        num_classes: int,
        target: str = "multiclass",
        dim: int = 128,
        num_tokens: int = 4,
        num_heads: int = 4,
        num_context: int = 8,
        num_blocks: int = 3,
        dropout: float = 0.1,
        crta: nn.Module | Literal["default"] | None = "default",
        memory: nn.Module | Literal["default"] | None = "default",
        alignment: nn.Module | Literal["default"] | None = "default",
        pool: nn.Module | None = None,
        head: nn.Module | None = None,
        evidence: nn.Module | None = None,
        reconstruction_weight: float = 1.0,
        alignment_weight: float = 0.1,
        contrastive_weight: float = 0.1,
        check_values: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_target(target, num_classes)
        for name, stage in (("crta", crta), ("memory", memory), ("alignment", alignment)):
            if not (stage is None or stage == "default" or isinstance(stage, nn.Module)):
                raise ValueError(
                    f"{name}={stage!r}: a stage is a module, None to leave it out, or 'default'. "
                    "Pass one of them."
                )
        for name, ours in (("target", target), ("num_classes", num_classes)):
            theirs = getattr(evidence, name, ours)
            if theirs != ours:
                raise ValueError(
                    f"evidence has {name}={theirs!r} with {name}={ours!r}: what both say is "
                    f"averaged, so they classify alike. Build both with one {name}."
                )
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        regular: dict[str, Any] = {"dropout": dropout, **kind}
        self.target = target
        self.check_values = check_values
        self.loss_weights = {
            "task": 1.0,
            "reconstruction": reconstruction_weight,
            "alignment": alignment_weight,
            "contrastive": contrastive_weight,
        }
        if evidence is not None:
            self.loss_weights["evidence"] = 1.0
        self.edge = ModalityEncoders(modalities, dim, num_tokens, check_values=check_values, **kind)
        sizes = (len(self.edge.names), num_tokens, dim)
        self.context = ContextTokens(num_context, dim, **kind)
        if crta is None and alignment is None:  # nobody reads it, and DDP must not wait for it
            self.context.requires_grad_(False)
        if crta == "default":
            crta = CRTA(*sizes, num_heads, num_blocks, **regular)
        self.crta: Any = crta
        self.absent: Any = AbsentTokens(*sizes, **kind) if crta is None else None
        if memory == "default":
            labels = num_classes if target in ("multilabel", "regression") else 1
            memory = MemoryBank(
                sizes[0], 512, dim, num_labels=labels, check_values=check_values, **kind
            )
        self.memory: Any = memory
        if alignment == "default":
            alignment = ReferenceAlignment(dim, num_heads, **regular)
        self.alignment: Any = alignment
        self.pool = ConcatPool(sizes[0], dim, **regular) if pool is None else pool
        self.head = Head(dim, num_classes, **regular) if head is None else head
        self.evidence: Any = evidence

    @property
    def names(self) -> tuple[str, ...]:
        """The modalities, in the order of the columns of ``present``."""
        return self.edge.names

    def reset_parameters(self) -> None:
        """Draw all parameters anew, those of passed encoders and layers included; forget memory."""
        reset_children(self)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"target={self.target!r}, loss_weights={self.loss_weights}"

    def forward(
        self,
        inputs: Mapping[str, Any],
        present: Tensor | None = None,
        visible: Tensor | None = None,
        labels: Tensor | None = None,
        sample_ids: Tensor | None = None,
    ) -> FusionOutput:
        """Run every stage; losses need ``labels``."""
        tokens, present, visible = observe(self.edge, inputs, present, visible, labels, sample_ids)
        context, guess, stages = self._synthesise(tokens, visible)
        neighbour_weights = neighbour_ids = None
        if self.memory is not None:
            readout, neighbour_weights, neighbour_ids = self.memory.lookup(
                guess, visible, sample_ids
            )
            guess = self.memory.gate(guess, readout, visible)
            stages = (*stages, guess) if stages else ()
        completed = torch.where(visible[:, :, None, None], tokens, guess)
        aligned, reference = completed, None
        if self.alignment is not None:
            aligned, reference = self.alignment(completed, context)
        fused = self.pool(aligned, torch.ones_like(visible))
        logits = fused_logits = self.head(fused)
        said = None if self.evidence is None else self.evidence(tokens, visible)
        if said is not None:
            logits = self._mean(fused_logits, said.logits)
        out = FusionOutput(
            logits=logits,
            fused=fused,
            tokens=tokens,
            synthesised=None if self.crta is None else guess,
            completed=completed,
            context=context,
            reference=reference,
            aligned=aligned,
            present=present,
            visible=visible,
            neighbour_weights=neighbour_weights,
            neighbour_ids=neighbour_ids,
            losses={},
            loss=None,
            fused_logits=fused_logits,
            evidence=None if said is None else said.evidence,
        )
        if labels is not None:
            losses = self._losses(out, fused_logits, said, stages, labels)
            terms = [self.loss_weights[name] * value for name, value in losses.items()]
            loss = torch.stack(terms).sum()
            out = out._replace(losses=losses, loss=loss)
        # last, so that a refused step leaves no trace; the memory may still refuse
        if self.training and sample_ids is not None and hasattr(self.memory, "write"):
            self.memory.write(tokens.mean(2), present, sample_ids, labels)
        if self.training and labels is not None and said is not None:
            self.evidence.count(labels, is_known(labels))
        return out

    def explain(self, out: FusionOutput) -> Explanation:
        """Say what was synthesised and from what, for an output of this model: no second pass."""
        weights = None
        if self.alignment is not None:
            weights = self.alignment.modality_weights(out.completed, out.context)
        return Explanation(~out.visible, out.neighbour_weights, out.neighbour_ids, weights)

    def _synthesise(
        self, tokens: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The updated context, a guess for every modality, and the stages to supervise."""
        context = self.context(tokens.shape[0])
        if self.crta is not None:
            out = self.crta(tokens, context, visible)
            return out.context, out.synthesised, out.stages
        # Without a cascade the guess is a learned constant: the same for every sample.
        return context, self.absent(tokens, torch.zeros_like(visible)), ()

    def _mean(self, fused_logits: Tensor, evidence_logits: Tensor) -> Tensor:
        """Two opinions in one: a product of experts, our design."""
        both = torch.stack([fused_logits, evidence_logits])
        if self.target == "multiclass":  # each says as much, whatever its scale
            both = both.to(wide_type(both)).log_softmax(-1).to(both.dtype)
        return both.mean(0)

    def _losses(
        self,
        out: FusionOutput,
        fused_logits: Tensor,
        said: EvidenceOutput | None,
        stages: tuple[Tensor, ...],
        labels: Tensor,
    ) -> dict[str, Tensor]:
        check_labels(labels, out.logits, self.target, check_values=self.check_values)
        gather = self.training  # validation may run on one rank alone
        asked: dict[str, Any] = {"gather": gather, "check_values": False}  # they were, above
        losses = {"task": task_loss(fused_logits, labels, self.target, **asked)}
        zero = out.logits.new_zeros((), dtype=wide_type(out.logits))
        losses["reconstruction"] = losses["alignment"] = losses["contrastive"] = zero
        if stages:  # every stage is supervised alike: deep supervision, our design
            guesses = torch.cat(stages, dim=2)  # (B, M, stages * L, D)
            truth = out.tokens.repeat(1, 1, len(stages), 1)
            hidden = out.present & ~out.visible
            losses["reconstruction"] = reconstruction_loss(guesses, truth, hidden, gather=gather)
        if out.reference is not None:
            losses["alignment"] = alignment_loss(out.aligned, out.reference, gather=gather)
        if self.target != "regression":
            # in that loss (B,) are class numbers: not what the one label of a multilabel target is
            shape = out.logits.shape if self.target == "multilabel" else (-1,)
            losses["contrastive"] = class_contrastive_loss(
                out.aligned.mean(2), labels.reshape(shape), **asked
            )
        if said is not None:
            losses["evidence"] = evidence_loss(
                said.scores, labels, out.visible, self.target, **asked
            )
        return losses
