"""Text to query vector: tokenizer, lookup, adapter, frozen blocks, pooling."""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from caravan.errors import BackboneError, DataError
from caravan.model.adapter import Adapter
from caravan.model.backbone import Backbone

# What a pass through the blocks costs beside its tokens, in tokens: measured on two cores; a GPU is idle below that.
_ALONE = {"cpu": 64, "cuda": 4096}


class Encoder(nn.Module):
    """A frozen backbone with a trainable adapter on its token embeddings.

    Sizes: B texts, T tokens, H width of the vectors.

    Attributes:
        backbone: frozen, never trained, never saved, never sent.
        adapter: trained, saved and sent.
        normalize: whether vectors are scaled to L2 norm 1.
    """

    def __init__(self, backbone: Backbone, adapter: Adapter) -> None:
        super().__init__()
        self.backbone = backbone
        self.adapter = adapter.to(backbone.config.device)
        self.normalize = backbone.config.normalize

    @property
    def width(self) -> int:
        """H, the width of the vectors."""
        return self.backbone.hidden_width

    @property
    def device(self) -> torch.device:
        """Where vectors are computed."""
        return torch.device(self.backbone.config.device)

    def forward(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Turn token ids into vectors, differentiably with respect to the adapter.

        Args:
            input_ids: int64 (B, T), padded on either side.
            mask: bool or int64 (B, T), 1 on tokens.

        Returns:
            float32 (B, H); rows have L2 norm 1 when `normalize` is set.
        """
        return self.vectors(self.adapter(self.backbone.embed(input_ids)), mask)

    def vectors(self, soft: Tensor, mask: Tensor, *, backbone: Backbone | None = None) -> Tensor:
        """Turn soft embeddings into vectors, differentiably with respect to them.

        Args:
            soft: float32 (B, T, E), as the adapter gives them.
            mask: bool or int64 (B, T), 1 on tokens.
            backbone: another copy of the blocks to compute with (a cast one, while training).

        Returns:
            float32 (B, H); rows have L2 norm 1 when `normalize` is set.
        """
        blocks, device = (backbone or self.backbone).blocks, soft.device
        lengths = _lengths(mask)
        order = sorted(range(len(lengths)), key=lambda row: lengths[row])
        pooled = []
        for part in even_parts([lengths[row] for row in order], alone=_alone(device)):
            rows, longest = torch.tensor(order[part.start : part.stop], device=device), lengths[order[part[-1]]]
            own = mask[rows, :longest]
            hidden = blocks(soft[rows, :longest], own).to(torch.float32)
            pooled.append(pool(hidden, own, self.backbone.pooling))
        vectors = torch.cat(pooled)[torch.tensor(order, device=device).argsort()]
        return functional.normalize(vectors, dim=1) if self.normalize else vectors

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Turn texts into token ids.

        Raises:
            DataError: a text is empty, no string, or holds characters that are no Unicode text (lone surrogates).
        """
        check_texts(texts)
        return self.backbone.tokenize(texts)

    @torch.no_grad()
    def encode(
        self, texts: Sequence[str], *, batch_size: int = 64, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """Turn texts into vectors (soft embeddings through the frozen blocks; arXiv:2509.16508).

        Texts of like length share a batch, so little is spent on padding.

        Args:
            texts: B strings; each is cut at `max_tokens` tokens.
            batch_size: texts a forward pass.
            progress: called with the number of texts done since the last call.

        Returns:
            float32 (B, H) on the encoder's device; rows have L2 norm 1 when `normalize` is set.

        Raises:
            DataError: a text is empty, no string, or no Unicode text.
            BackboneError: the states overflow the dtype in which the blocks compute.
        """
        tokens = self.tokenize(texts)
        order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
        vectors = torch.empty(len(tokens), self.width, device=self.device)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            input_ids, mask = pad([tokens[index] for index in chosen], device=self.device)
            vectors[torch.tensor(chosen, device=self.device)] = self(input_ids, mask)
            if progress is not None:
                progress(len(chosen))
        if not torch.isfinite(vectors).all():
            config = self.backbone.config
            raise BackboneError(
                f"{config.name} in {config.dtype} gives vectors that are not finite for some texts; "
                f'set backbone.dtype = "float32"'
            )
        return vectors

    def key(self) -> str:
        """Name what `encode` computes: sha256 hex over backbone, pooling, length limit and the adapter's numbers."""
        backbone = self.backbone
        parts = [backbone.hash, backbone.pooling, backbone.max_tokens, self.normalize, backbone.config.dtype]
        digest = hashlib.sha256(repr(parts).encode())
        if not self.is_identity():
            # Buffers too: the frozen frame of a core adapter is not saved, but another seed is another map.
            for name, tensor in (*self.adapter.named_parameters(), *self.adapter.named_buffers()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def is_identity(self) -> bool:
        """Whether the adapter changes nothing (as at the start), so that cached vectors of the bare backbone hold."""
        return self.adapter.is_identity()

    def folded_table(self) -> Tensor:
        """Give the token-embedding table, float32 (V, E), with which the plain backbone gives this encoder's states."""
        return self.adapter.fold(self.backbone.table.weight, scale=self.backbone.embedding_scale)


def even_parts(lengths: Sequence[int], *, alone: int) -> list[range]:
    """Cut texts into groups that go through the blocks one after another, so that least is computed in all.

    A group costs as many places as it has texts, times its longest, and what a pass costs by itself.

    Args:
        lengths: tokens of each text, ascending.
        alone: what a pass costs by itself, in places.

    Returns:
        The groups in order, none empty; together all texts.
    """
    # After a text no cut is worth a thought unless the next one is longer.
    ends = [end for end in range(1, len(lengths) + 1) if end == len(lengths) or lengths[end] > lengths[end - 1]]
    least: dict[int, tuple[int, int]] = {0: (0, 0)}  # up to an end: what it costs, and where the last group starts
    for end in ends:
        costs = ((cost + alone + (end - start) * lengths[end - 1], start) for start, (cost, _) in least.items())
        least[end] = min(costs)
    parts: list[range] = []
    end = len(lengths)
    while end:
        start = least[end][1]
        parts.insert(0, range(start, end))
        end = start
    return parts


def places(lengths: Sequence[int], device: torch.device) -> int:
    """How many places are computed for texts of so many tokens, padding among them, when they go through together."""
    ordered = sorted(lengths)
    return sum(len(part) * ordered[part[-1]] for part in even_parts(ordered, alone=_alone(device)))


def _alone(device: torch.device) -> int:
    return _ALONE.get(device.type, _ALONE["cuda"])


def _lengths(mask: Tensor) -> list[int]:
    """Up to where each text's tokens reach: padding on the left counts, since only the right can be cut off."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (places * (mask != 0)).amax(dim=1).tolist()


def check_texts(texts: Sequence[str]) -> None:
    """Refuse what cannot be encoded.

    Raises:
        DataError: a text is empty, no string, or holds characters that are no Unicode text (lone surrogates).
    """
    for number, text in enumerate(texts, start=1):
        where = f"text {number} of {len(texts)}"
        if not isinstance(text, str):
            raise DataError(f"{where} is of type {type(text).__name__}; give a string")
        if not text.strip():
            raise DataError(f"{where} is empty; give at least one word")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{where} holds a lone surrogate, which is no character; remove it") from None


def pad(tokens: Sequence[Sequence[int]], *, device: torch.device, side: str = "right") -> tuple[Tensor, Tensor]:
    """Make a rectangle of token lists.

    Args:
        tokens: B lists of 1 to T ids.
        device: where the tensors go.
        side: where padding stands, "right" or "left".

    Returns:
        int64 (B, T) ids with 0 on padding, and bool (B, T), True on tokens.
    """
    longest = max(len(ids) for ids in tokens)
    input_ids = torch.zeros(len(tokens), longest, dtype=torch.int64)
    mask = torch.zeros(len(tokens), longest, dtype=torch.bool)
    for row, ids in enumerate(tokens):
        place = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        input_ids[row, place] = torch.tensor(ids)
        mask[row, place] = True
    return input_ids.to(device), mask.to(device)


def pool(hidden: Tensor, mask: Tensor, how: str) -> Tensor:
    """Make one vector of a text's hidden states.

    Args:
        hidden: float (B, T, H).
        mask: bool or int64 (B, T), 1 on tokens; every row has at least one.
        how: "mean" over tokens, "last" token, or "cls" (the first token).

    Returns:
        float (B, H).
    """
    if how == "mean":
        # Padding is left out, not multiplied by 0: what stands there need not be finite.
        total = hidden.masked_fill(mask.unsqueeze(2) == 0, 0).sum(dim=1)
        return total / mask.sum(dim=1, keepdim=True)
    columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if how == "last":
        chosen = columns.masked_fill(mask == 0, -1).argmax(dim=1)
    else:
        chosen = columns.masked_fill(mask == 0, mask.shape[1]).argmin(dim=1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), chosen]
