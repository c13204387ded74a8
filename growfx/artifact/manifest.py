"""The manifest of an artifact: a description of the weights file, checked before use.

It stands as canonical JSON in the weights file's one metadata entry, beside its own SHA-256: two entries
would be written in an order that differs from run to run. Per tensor it gives dtype, shape and a CRC-32 of
each stored stream; per sparse tensor also the number of active weights and the codecs. Digest and checksums
show damage, not who wrote the file.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from growfx.artifact.codec import INDEX_CODECS, VALUE_CODECS, index_complaint, values_complaint
from growfx.artifact.entries import COMPLEX_PARTS, ITEMSIZES, DenseEntry, SparseEntry
from growfx.artifact.input_specs import MOST_INPUTS, GivenOutputs, InputSpec, input_complaint, outputs_complaint
from growfx.artifact.stored_cost import StoredCost, cost_complaint
from growfx.compaction.plan import CompactionPlan
from growfx.errors import ArtifactError

__all__ = [
    "FORMAT",
    "ITEMSIZES",
    "VERSION",
    "DenseEntry",
    "LayerEntry",
    "Manifest",
    "SparseEntry",
    "check_version",
    "from_metadata",
    "to_metadata",
]

FORMAT = "growfx.sparse"
# 1.1: `compaction` and `requires`. 1.2: `inputs`, `outputs`, `identity_checked`, `notes`, `multiply_accumulates`,
# complex tensors.
VERSION = "1.2"
# What a reader must know beyond version 1.0 to load an artifact that lists it in `requires`.
FEATURES = (
    "compaction",
    "complex",
    "grouped-compaction",
    "folded-norms",
    "left-out-modules",
    "stated-widths",
    "heads",
)
# No model comes near it; beyond it sizes would not fit the integers of other readers.
_MAX_NUMEL = 1 << 34
_MAX_RANK = 64
_MOST_NOTES, _LONGEST_NOTE = 16, 2000
_SEMANTICS = {"fill": "+0.0", "mask": "explicit", "order": "C"}


@dataclass(frozen=True)
class LayerEntry:
    """A masked layer and the tensor its mask belongs to."""

    layer: str
    tensor: str


@dataclass(frozen=True)
class Manifest:
    """The description of a weights file.

    Attributes:
        tensors: name in the state dict -> entry.
        aliases: further names of tied tensors -> the name that is stored.
        layers: the masked layers in data-flow order; one with a dense entry is full.
        config: the folder's `config.json` without its `growfx` block.
        model: how the model is built (`library`, `name`, `kwargs`), or None.
        provenance: what the writer wanted to note.
        compaction: what the model has to lose before it takes these tensors, None when nothing.
        inputs: what the network is called with, None where that is not known.
        identity_checked: whether what `model` builds gave the network's outputs when it was saved.
        notes: why `model` is None.
        cost: of a forward pass, None where it is not known.
        outputs: on `inputs`, None where that is not known.
    """

    tensors: Mapping[str, DenseEntry | SparseEntry]
    aliases: Mapping[str, str]
    layers: tuple[LayerEntry, ...]
    config: Mapping[str, Any]
    model: Mapping[str, Any] | None
    provenance: Mapping[str, Any]
    version: str = VERSION
    compaction: CompactionPlan | None = None
    inputs: tuple[InputSpec, ...] | None = None
    identity_checked: bool = False
    notes: tuple[str, ...] = ()
    cost: StoredCost | None = None
    outputs: GivenOutputs | None = None

    @property
    def names(self) -> set[str]:
        """All names of the state dict."""
        return {*self.tensors, *self.aliases}

    def entry(self, name: str) -> DenseEntry | SparseEntry:
        """The entry of a name of the state dict, tied names included."""
        return self.tensors[self.aliases.get(name, name)]

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all tensors once they are decoded."""
        return sum(e.numel * ITEMSIZES[e.dtype] for e in self.tensors.values())

    def to_json(self) -> dict[str, Any]:
        """The manifest as JSON values."""
        extra: dict[str, Any] = {"compaction": self.compaction.to_json()} if self.compaction else {}
        required = _features(self.compaction, self.tensors)
        if required:
            extra["requires"] = required
        return {
            **_SEMANTICS,
            **extra,
            "aliases": dict(self.aliases),
            "config": dict(self.config),
            "format": FORMAT,
            "identity_checked": self.identity_checked,
            "inputs": None if self.inputs is None else [spec.to_json() for spec in self.inputs],
            "layers": [[entry.layer, entry.tensor] for entry in self.layers],
            "model": None if self.model is None else dict(self.model),
            "multiply_accumulates": None if self.cost is None else self.cost.to_json(),
            "notes": list(self.notes),
            "outputs": None if self.outputs is None else self.outputs.to_json(),
            "provenance": dict(self.provenance),
            "tensors": {name: entry.to_json() for name, entry in self.tensors.items()},
            "version": self.version,
        }


def _features(plan: CompactionPlan | None, tensors: Mapping[str, DenseEntry | SparseEntry]) -> list[str]:
    """What a reader must know to follow a plan and to decode the tensors."""
    needed = {
        "compaction": bool(plan),
        "complex": any(entry.dtype in COMPLEX_PARTS for entry in tensors.values()),
        "grouped-compaction": bool(plan and plan.blocks),
        "folded-norms": bool(plan and plan.norms),
        "left-out-modules": bool(plan and plan.left_out),
        "stated-widths": bool(plan and plan.widths),
        "heads": bool(plan and plan.heads),
    }
    return [name for name in FEATURES if needed[name]]


def to_metadata(manifest: Manifest) -> str:
    """Canonical JSON `{manifest, sha256}`.

    Raises:
        ArtifactError: config, model arguments or provenance hold something that JSON cannot.
    """
    body = manifest.to_json()
    return canonical({"manifest": body, "sha256": _digest(canonical(body))})


def from_metadata(text: str) -> Manifest:
    """Read and check a manifest.

    Raises:
        ArtifactError: damaged, of a newer major version, with an unknown codec, or inconsistent.
    """
    try:
        outer = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"the artifact is damaged: its manifest is not JSON ({error})") from error
    if not isinstance(outer, dict) or not isinstance(outer.get("manifest"), dict):
        raise ArtifactError("the artifact is damaged: its metadata holds no manifest")
    body: dict[str, Any] = outer["manifest"]
    # The manifest is put into text once: it may be as large as a header can be.
    parts = {key: canonical(value) for key, value in outer.items()}
    again = ",".join(f"{canonical(key)}:{parts[key]}" for key in sorted(parts))
    if outer.get("sha256") != _digest(parts["manifest"]) or f"{{{again}}}" != text:
        raise ArtifactError("the artifact is damaged: its manifest does not agree with its SHA-256")
    check_version(body.get("format"), body.get("version"))
    return _Reader("manifest", body).manifest()


def check_version(name: object, version: object) -> None:
    """Refuse another format, and a version whose major number is above this reader's.

    Raises:
        ArtifactError: see above.
    """
    if name != FORMAT:
        raise ArtifactError(f"the artifact's format is `{name}`; this reads `{FORMAT}`")
    major, dot, minor = version.partition(".") if isinstance(version, str) else ("", "", "")
    if not (dot and all(part.isascii() and part.isdigit() and len(part) < 6 for part in (major, minor))):
        raise ArtifactError(f"the artifact is damaged: `{version}` is not a format version")
    if int(major) > int(VERSION.partition(".")[0]):
        raise ArtifactError(
            f"the artifact was written in format version {version}; this growfx reads versions up to "
            f"{VERSION}: upgrade growfx"
        )


def canonical(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, ASCII, no NaN.

    Raises:
        ArtifactError: `value` holds something that JSON cannot.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"only JSON values can be stored beside the weights ({error})") from error


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


@dataclass(frozen=True)
class _Reader:
    """Typed access to a JSON object; every complaint says where."""

    where: str
    body: Mapping[str, Any]

    def fail(self, what: str) -> ArtifactError:
        return ArtifactError(f"the artifact is damaged: {self.where}: {what}")

    def take(self, key: str, kind: type | tuple[type, ...]) -> Any:
        value = self.body.get(key)
        # bool is an int to Python, not to JSON.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fail(f"field `{key}` is missing or of the wrong type")
        return value

    def count(self, key: str) -> int:
        value = self.take(key, int)
        if value < 0:
            raise self.fail(f"field `{key}` is negative")
        return value

    def counts(self, key: str) -> tuple[int, ...]:
        values = self.take(key, list)
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
            raise self.fail(f"field `{key}` is not a list of sizes")
        return tuple(values)

    def inner(self, key: str) -> "_Reader":
        return _Reader(f"{self.where}, {key}", self.take(key, dict))

    def codec(self, known: tuple[str, ...]) -> str:
        name = self.take("codec", str)
        if name not in known:
            raise ArtifactError(
                f"{self.where}: codec `{name}` is unknown to this growfx; known: {', '.join(known)}. "
                "A newer growfx may read it"
            )
        return name

    def manifest(self) -> Manifest:
        for key, value in _SEMANTICS.items():
            if self.body.get(key) != value:
                raise self.fail(f"field `{key}` is not `{value}`")
        required, plan = self._required(), self._compaction()
        tensors = {name: _Reader(f"tensor `{name}`", e).tensor() for name, e in self._objects("tensors").items()}
        needed = {*_features(plan, tensors)} | ({"compaction"} if plan is not None else set())
        if required - {"complex"} != needed - {"complex"}:
            raise self.fail("fields `compaction` and `requires` do not agree")
        if required != needed:
            raise self.fail("fields `tensors` and `requires` do not agree about complex tensors")
        aliases = self.take("aliases", dict)
        for alias, name in aliases.items():
            if alias in tensors or not isinstance(name, str) or name not in tensors:
                raise self.fail(f"`{alias}` is not a further name of a stored tensor")
        layers = self._layers(tensors)
        return Manifest(
            tensors=tensors,
            aliases=aliases,
            layers=layers,
            config=self.take("config", dict),
            model=self.take("model", (dict, type(None))),
            provenance=self.take("provenance", dict),
            version=self.take("version", str),
            compaction=plan,
            inputs=self._inputs(),
            identity_checked=self._flag("identity_checked"),
            notes=self._notes(),
            cost=self._cost([entry.layer for entry in layers]),
            outputs=self._outputs(),
        )

    def _flag(self, key: str) -> bool:
        value = self.body.get(key, False)  # older versions have none
        if not isinstance(value, bool):
            raise self.fail(f"field `{key}` is neither true nor false")
        return value

    def _notes(self) -> tuple[str, ...]:
        notes = self.body.get("notes", [])
        texts = isinstance(notes, list) and all(isinstance(note, str) for note in notes)
        if not texts or len(notes) > _MOST_NOTES or any(len(note) > _LONGEST_NOTE for note in notes):
            raise self.fail("field `notes` is not a list of a few short texts")
        return tuple(notes)

    def _cost(self, layers: list[str]) -> StoredCost | None:
        entry = self.body.get("multiply_accumulates")  # older versions have none
        if entry is None:
            return None
        complaint = cost_complaint(entry, layers)
        if complaint:
            raise self.fail(f"field `multiply_accumulates`: {complaint}")
        return StoredCost.from_json(entry, layers)

    def _inputs(self) -> tuple[InputSpec, ...] | None:
        inputs = self.body.get("inputs")
        if inputs is None:
            return None
        if not isinstance(inputs, list) or not 0 < len(inputs) <= MOST_INPUTS:
            raise self.fail(f"field `inputs` is not a list of up to {MOST_INPUTS} inputs")
        for entry in inputs:
            complaint = input_complaint(entry, ITEMSIZES)
            if complaint:
                raise self.fail(f"field `inputs`: {complaint}")
        specs = tuple(InputSpec.from_json(entry) for entry in inputs)
        keywords = [spec.keyword for spec in specs if spec.keyword is not None]
        if len({*keywords}) != len(keywords) or any(s.keyword is None for s in specs[len(specs) - len(keywords) :]):
            raise self.fail("field `inputs` names a keyword twice, or has a positional input after it")
        return specs

    def _outputs(self) -> GivenOutputs | None:
        entry = self.body.get("outputs")  # older versions have none
        if entry is None:
            return None
        complaint = outputs_complaint(entry)
        if complaint:
            raise self.fail(f"field `outputs`: {complaint}")
        return GivenOutputs.from_json(entry)

    def _required(self) -> set[str]:
        required = self.body.get("requires", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self.fail("field `requires` is not a list of names")
        unknown = sorted({*required} - {*FEATURES})
        if unknown:
            raise ArtifactError(
                f"the artifact requires `{unknown[0]}`, unknown to this growfx; known: {', '.join(FEATURES)}. "
                "A newer growfx may read it"
            )
        return {*required}

    def _compaction(self) -> CompactionPlan | None:
        return CompactionPlan.from_json(self.body["compaction"]) if "compaction" in self.body else None

    def _objects(self, key: str) -> dict[str, Mapping[str, Any]]:
        objects = self.take(key, dict)
        for name, value in objects.items():
            if not isinstance(value, dict):
                raise self.fail(f"`{name}` in `{key}` is not an object")
        return objects

    def _layers(self, tensors: Mapping[str, Any]) -> tuple[LayerEntry, ...]:
        pairs = self.take("layers", list)
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) for p in pair)):
                raise self.fail("field `layers` is not a list of name pairs")
        entries = tuple(LayerEntry(*pair) for pair in pairs)
        owners = {e.tensor: e.layer for e in entries}
        if len(owners) != len(entries) or len({e.layer for e in entries}) != len(entries):
            raise self.fail("a layer or its tensor is listed twice")
        sparse = {name for name, entry in tensors.items() if isinstance(entry, SparseEntry)}
        if not sparse <= owners.keys() <= tensors.keys():
            raise self.fail("the masked layers do not agree with the tensors")
        return entries

    def tensor(self) -> DenseEntry | SparseEntry:
        dtype, shape = self.take("dtype", str), self.counts("shape")
        if dtype not in ITEMSIZES:
            raise self.fail(f"dtype `{dtype}` is unknown; allowed: {', '.join(ITEMSIZES)}")
        if len(shape) > _MAX_RANK:
            raise self.fail(f"its shape has {len(shape)} dimensions; allowed are {_MAX_RANK}")
        # A size of zero must not hide others too large for any tensor.
        if prod(max(size, 1) for size in shape) > _MAX_NUMEL:
            raise self.fail(f"its shape has more elements than the format allows ({_MAX_NUMEL})")
        if "index" not in self.body:
            return DenseEntry(dtype, shape, self.count("crc32"))
        if dtype in COMPLEX_PARTS:
            raise self.fail(f"sparse tensors of dtype `{dtype}` are unknown")
        nnz = self.count("nnz")
        if nnz > prod(shape):
            raise self.fail(f"{nnz} active weights in {prod(shape)} elements")
        index, values = self.inner("index"), self.inner("values")
        value_codec = values.codec(VALUE_CODECS)
        entry = SparseEntry(
            dtype=dtype,
            shape=shape,
            nnz=nnz,
            index_codec=index.codec(INDEX_CODECS),
            index_raw=index.count("raw"),
            index_bytes=index.count("bytes"),
            index_crc32=index.count("crc32"),
            value_codec=value_codec,
            planes=values.counts("planes") if value_codec == "planes" else (),
            values_crc32=values.count("crc32"),
        )
        complaint = index_complaint(entry.index_codec, entry.index_raw, entry.index_bytes, nnz, entry.numel)
        complaint = complaint or values_complaint(value_codec, entry.planes, nnz, ITEMSIZES[dtype])
        if complaint:
            raise self.fail(complaint)
        return entry
