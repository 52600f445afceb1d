"""``model.json``: everything of a model but its tensors, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.plan import Analysis, LayerPlan
from ..calling import Structure
from ..capture.captured import Way
from ..capture.regions import SWITCHES
from ..errors import ArtifactError
from ..facts import Facts, Sizes
from ..gates import compile_gates
from ..inspection import Row, rows_of
from ..model import HATModel
from ..modules import HATConfig, Masker, TaskIndexedParameter
from ..report import ConversionReport
from ..verification import VerificationReport
from .constants import constant_from, constant_to, portable
from .expressions import guard_from, guard_to
from .fields import Fields, typed
from .gates import TABLE, Budget, Ids, StoredIds, table_from, uses_from, uses_to
from .graphs import check_places, graph_from, graph_to
from .known import Known
from .layers import LayerReader, LayerWriter
from .lowered import BY_ITEM, Recipe
from .lowering import lower_layers
from .meanings import meaning_from, meaning_to
from .own_code import describe_own_code, own_code_from
from .signatures import signature_from, signature_to, structure_from
from .tree import Inventory, TreeReader, TreeWriter, bind_masks

__all__ = ["Description", "describe_model", "Rebuilt"]

REPORT, PROOF = typed(ConversionReport), typed(VerificationReport)
_PLAN = ("path", "role", "rung", "reason", "masker", "channels")


class Description:
    """A model taken apart.

    Attributes:
        data: what goes into ``model.json``.
        tensors: parameters, buffers, marks of finished tasks.
    """

    def __init__(self, hat: HATModel) -> None:
        facts = hat._facts
        ids = Ids()
        lowering = lower_layers(hat)
        layers = LayerWriter(lowering.recipes, lowering.refusals)
        tree = TreeWriter(hat, layers, ids)
        self.tensors = tree.tensors
        maskers = [*facts.analysis.sizes]
        graphs = {"eval": hat.graph, **({} if hat.train_graph is None else {"train": hat.train_graph})}
        self.data: dict[str, Any] = {
            "name": facts.name,
            "graphs": {name: graph_to(graph, name, own=True) for name, graph in graphs.items()},
            "outputs": {"eval": facts.output.to_json(), "train": facts.train_output.to_json()},
            "signature": signature_to(facts.signature),
            "sizes": _sizes_to(facts.check_sizes),
            "modules": tree.entries,
            "own_code": describe_own_code(hat, lowering, layers, _recipe_to),
            "recipes": [_recipe_to(recipe) for recipe in layers.recipes],
            "room": facts.room,
            "maskers": {name: {"path": facts.masker_paths[name], "channels": facts.analysis.sizes[name]} for name in maskers},
            "indexed": {
                "paths": dict(facts.indexed_paths),
                "parameters": list(facts.indexed),
                "buffers": list(facts.indexed_buffers),
            },
            "uses": uses_to(facts.uses, ids),
            "original": {"keys": list(facts.original_keys), "names": list(facts.original_names)},
            "switches": facts.switches,
            "can_train": facts.can_train,
            "asks": {"train" if mode else "eval": list(places) for mode, places in facts.asks.items()},
            "own_modes": {"train" if mode else "eval": list(paths) for mode, paths in facts.own_modes.items()},
            "plans": _plans_to(facts.analysis),
            "rows": [_row_to(row, ids) for row in rows_of(hat)],
            "report": None if hat.report is None else hat.report.to_dict(),
            "verification": None if hat.verification is None else asdict(hat.verification),
        }
        self.data["unlike"] = {
            "train" if mode else "eval": [
                [constant_to(way.dtype), constant_to(way.autocast), portable(line)] for way, line in ways.items()
            ]
            for mode, ways in facts.unlike.items()
        }
        self.data["parameter_types"] = [constant_to(dtype) for dtype in facts.parameter_types]
        self.data["input_types"] = [constant_to(dtype) for dtype in facts.input_types]
        self.data["selections"] = list(facts.selections)
        self._table = lambda: facts.analysis.table.stored(maskers)
        self._ids = ids.tensors()
        for number, value in enumerate(facts.selections.values()):
            self._ids[f"selections.{number}"] = value

    def gates(self) -> dict[str, Tensor]:
        """The tensors of the mask algebra. The table is made when it is asked for: a hundred thousand expressions take their time, which a
        thread can spend that has nothing else to do (and is to use none of torch's own threads, which would get in the way)."""
        return {TABLE: self._table(), **self._ids}


def describe_model(hat: HATModel) -> Description:
    """Takes a model apart.

    Raises:
        ArtifactError: a layer, a function or a constant that cannot be stored; names it, and the fix.
    """
    return Description(hat)


def _sizes_to(sizes: Sizes) -> dict[str, Any]:
    try:
        guards = [guard_to(guard) for guard in sizes.guards]
    except ValueError as error:
        raise ArtifactError(
            "a condition on sizes cannot be stored", why=str(error), fix="convert with other example inputs"
        ) from error
    return {
        "names": list(sizes.names),
        "fixed": [[name, dim, size] for (name, dim), size in sizes.fixed.items()],
        "guards": guards,
        "inputs": [{"dims": t.dim(), "floating": t.dtype.is_floating_point} for t in sizes.example],
    }


def _sizes_from(fields: Fields, names: list[str]) -> Sizes:
    fields.only("names", "fixed", "guards", "inputs")
    if fields.list("names", str) != names:
        raise fields.at("names").wrong(str(fields.data["names"])[:80], f"the names of the inputs, {names}")
    example = []
    for part in fields.at("inputs").items():
        part.only("dims", "floating")
        dtype = torch.float32 if part.get("floating", bool) else torch.int64
        example.append(torch.empty([1] * part.at("dims").count(most=64), dtype=dtype, device="meta"))
    if len(example) != len(names):
        raise fields.at("inputs").wrong(str(len(example)), f"{len(names)} inputs")
    fixed = {}
    for part in fields.at("fixed").items():
        name = part.at(0).one_of(*names)
        fixed[name, part.at(1).count(most=64)] = part.at(2).count()
    guards = [guard_from(part, [t.dim() for t in example]) for part in fields.at("guards").items()]
    return Sizes.of(names, fixed, guards, example)


def _recipe_to(recipe: Recipe) -> dict[str, Any]:
    return {
        "was": recipe.was,
        "graphs": {mode: graph_to(graph, f"{recipe.was}, {mode}") for mode, graph in recipe.graphs.items()},
        "outputs": {mode: structure.to_json() for mode, structure in recipe.outputs.items()},
        "signature": signature_to(recipe.signature),
        "sizes": _sizes_to(recipe.sizes),
        "meaning": meaning_to(recipe.meaning),
    }


def _plans_to(analysis: Analysis) -> dict[str, Any]:
    plans = {}
    for shelf in ("layers", "parameters"):
        plans[shelf] = {name: {f: getattr(plan, f) for f in _PLAN} for name, plan in getattr(analysis, shelf).items()}
    return {**plans, "class_heads": sorted(analysis.class_heads)}


def _plans_from(fields: Fields, analysis: Analysis) -> None:
    fields.only("layers", "parameters", "class_heads")
    for shelf in ("layers", "parameters"):
        for name, part in fields.at(shelf).pairs():
            part.only(*_PLAN)
            values = {f: part.get(f, str) for f in ("path", "role", "rung", "reason")}
            plan = LayerPlan(**values, masker=part.get("masker", str, optional=True), channels=part.at("channels").count())
            getattr(analysis, shelf)[name] = plan
    analysis.class_heads = set(fields.list("class_heads", str))


def _row_to(row: Row, ids: Ids) -> dict[str, Any]:
    # not ``asdict``: it would copy the ids, and with them all the memory that they are a part of
    return {**vars(row), "shape": list(row.shape), "ids": ids.add(row.ids), "inputs": list(row.inputs)}


def _row_from(fields: Fields, ids: StoredIds) -> Row:
    fields.only("name", "op", "target", "shape", "ids", "state", "scope", "inputs", "constant", "gated")
    texts = {name: fields.get(name, str) for name in ("name", "op", "target", "state", "scope")}
    flags = {name: fields.get(name, bool) for name in ("constant", "gated")}
    return Row(
        **texts,
        **flags,
        shape=tuple(fields.list("shape", str)),
        inputs=tuple(fields.list("inputs", str)),
        ids=ids.get(fields.at("ids")),
    )


class Rebuilt:
    """A model put together again from its description, all of it checked; then filled with its tensors.

    Attributes:
        model: the model, without values until :meth:`fill` got the tensors of the inventory and :meth:`filled` was called.
    """

    def __init__(
        self,
        fields: Fields,
        inventory: Inventory,
        config: HATConfig,
        settings: dict[str, Any],
        training: bool,
        gates: Mapping[str, Tensor],
        gates_file: str,
        inputs: list[Tensor],
        known: Known,
    ) -> None:
        fields.only("name", "graphs", "outputs", "signature", "sizes", "modules", "own_code", "recipes", "room", "maskers",
                    "indexed", "uses", "original",
                    "switches", "can_train", "asks", "own_modes", "unlike", "parameter_types", "input_types", "selections",
                    "plans", "rows", "report", "verification")  # fmt: skip
        self.fields = fields
        modules, classes = known.modules, known.classes
        ids = StoredIds(gates, gates_file)
        recipes = [_recipe_head(part, classes) for part in fields.at("recipes").items()]
        self.tree = TreeReader(fields.at("modules"), training, config, LayerReader(recipes, modules), ids, inventory)
        own = fields.at("own_code") if fields.has("own_code") and fields.data["own_code"] is not None else None
        held = [*self.tree.modules()]
        if own is not None:
            own.only("recipe", "modules")
            reader = LayerReader(recipes, modules)
            own_inventory = Inventory(own.at("modules"))
            own_tree = TreeReader(own.at("modules"), training, config, reader, ids, own_inventory, top=("scope", "plain"))
            own_tree.fill_on_meta()
            held += own_tree.modules()
        for recipe, part in zip(recipes, fields.at("recipes").items()):
            users = [m for m in held if vars(m).get("recipe") is recipe]
            if not users:
                raise part.wrong("a recipe of no layer", "one that a layer names")
            _recipe_body(recipe, part, users)
        root = self.tree.root
        self.graphs = {name: graph_from(part, root, functions=known.functions) for name, part in fields.at("graphs").pairs()}
        _check_modes(fields, self.graphs)
        analysis, paths = Analysis(), {}
        for name, part in fields.at("maskers").pairs():
            paths[name], analysis.sizes[name] = self._masker(part, config.num_tasks)
        analysis.table = table_from(gates[TABLE], [*paths], analysis.sizes, gates_file)
        analysis.uses = uses_from(fields.at("uses"), ids, self.tree.numel)
        _plans_from(fields.at("plans"), analysis)
        budget = Budget(len(analysis.table) + ids.ids.numel(), gates_file)
        program = compile_gates(analysis.table, analysis.sizes, budget)
        bind_masks(self.tree, program, analysis.table.describe)
        signature = signature_from(fields.at("signature"), classes)
        sizes = _sizes_from(fields.at("sizes"), signature.names)
        if [(t.dim(), t.dtype.is_floating_point) for t in inputs] != [(t.dim(), t.dtype.is_floating_point) for t in sizes.example]:
            raise fields.at("sizes").wrong("other inputs", "the ranks of the example inputs")
        held = fields.at("outputs").only("eval", "train")
        outputs = {mode: structure_from(held.at(mode), classes) for mode in ("eval", "train")}
        _check_calls(fields, self.graphs, outputs, len(signature.names) + 1)  # and the task
        indexed = fields.at("indexed").only("paths", "parameters", "buffers")
        original = fields.at("original").only("keys", "names")
        graphs = [*self.graphs.values(), *(g for recipe in recipes for g in recipe.graphs.values())]
        self.facts = Facts(
            name=fields.get("name", str),
            config=config,
            settings=settings,
            signature=signature,
            inputs=inputs,
            output=outputs["eval"],
            train_output=outputs["train"],
            check_sizes=sizes,
            room=self._room(),
            masker_paths=paths,
            indexed_paths=self._copies(indexed),
            program=program,
            uses=analysis.uses,
            indexed=self._named(indexed.at("parameters")),
            indexed_buffers=self._named(indexed.at("buffers")),
            original_keys=original.list("keys", str),
            original_names=self._named(original.at("names")),
            analysis=analysis,
            rows=[_row_from(part, ids) for part in fields.at("rows").items()],
            switches=fields.get("switches", bool) or any(n.target in SWITCHES for g in graphs for n in g.nodes),
            can_train=fields.get("can_train", bool),
            selections={
                part.data: self._selection(part, n, gates, gates_file) for n, part in enumerate(fields.at("selections").items())
            },
            asks={training: [place.is_a(str) for place in part.items()] for training, part in self._by_mode("asks", added=False)},
            own_modes=self._own_modes(),
            unlike=self._unlike(),
            parameter_types=self._types("parameter_types", torch.dtype),
            input_types=self._types("input_types", torch.dtype | None),
            stand_in=None if own is None else self._own_code(own, own_tree, classes, original),
        )
        self.model = self._made()

    def _own_code(self, own: Fields, tree: TreeReader, classes: Mapping[str, type], original: Fields) -> nn.Module:
        recipe = None
        part = own.at("recipe")
        if part.data is not None:
            recipe = _recipe_head(part, classes)
            _recipe_body(recipe, part, [tree.root])
        return own_code_from(tree, recipe, own, original.list("names", str))

    def _masker(self, fields: Fields, tasks: int) -> tuple[str, int]:
        """Where a masker is, and its channels."""
        fields.only("path", "channels")
        path, channels = fields.get("path", str), fields.at("channels").count(1)
        masker = self.tree.module(path)
        held = masker._modules.get("embeddings") if isinstance(masker, Masker) and masker.channels == channels else None
        embeddings = [] if held is None else [*held._parameters.values()]
        if len(embeddings) != tasks or any(tuple(e.shape) != (channels,) for e in embeddings):
            raise fields.wrong(repr(path[:100]), f"a masker of {channels} channels and {tasks} tasks")
        return path, channels

    def _by_mode(self, name: str, added: bool = True) -> Iterator[tuple[bool, Fields]]:
        """What is stored for train mode (True) and eval mode; older directories have nothing of what was ``added``."""
        if not added or self.fields.has(name):
            for mode, part in self.fields.at(name).only("train", "eval").pairs():
                yield mode == "train", part

    def _own_modes(self) -> dict[bool, list[str]]:
        """The modules that the original's ``train()`` and ``eval()`` leave in the other mode."""
        found: dict[bool, list[str]] = {}
        for training, part in self._by_mode("own_modes"):
            found[training] = [path.is_a(str) for path in part.items()]
            for path in part.items():
                if self.tree.module(path.data) is None:
                    raise path.wrong(repr(path.data[:100]), "the path of a module")
        return found

    def _unlike(self) -> dict[bool, dict[Way, str]]:
        """The types in which the original takes another path."""
        found: dict[bool, dict[Way, str]] = {}
        for training, part in self._by_mode("unlike"):
            found[training] = ways = {}
            for entry in part.items():
                if len(entry.is_a(list)) != 3:
                    raise entry.wrong(str(entry.data)[:60], "a type, that of autocast, and a source line")
                dtype, autocast = (entry.at(i).decoded(constant_from, "a type") for i in range(2))
                if not isinstance(dtype, torch.dtype) or not isinstance(autocast, torch.dtype | None):
                    raise entry.wrong(str(entry.data[:2])[:60], "types")
                ways[Way(dtype, autocast)] = entry.at(2).is_a(str)
        return found

    def _types(self, name: str, kind: Any) -> list[Any]:
        """Types of tensors; older directories have none."""
        found = []
        for part in self.fields.at(name).items() if self.fields.has(name) else ():
            found.append(part.decoded(constant_from, "a type"))
            if not isinstance(found[-1], kind):
                raise part.wrong(str(part.data)[:60], "a type")
        return found

    def _room(self) -> str:
        room = self.fields.at("room").name()
        found = self.tree.module(room)
        if found is None or [*found._modules] != ["maskers", "masks", "indexed", "constants", "status"]:
            raise self.fields.at("room").wrong(repr(room[:60]), "the module that holds what the conversion added")
        return room

    def _copies(self, indexed: Fields) -> dict[str, str]:
        """Where the task copies of raw parameters and buffers are, by the name of what they are copies of."""
        paths = {name: part.is_a(str) for name, part in indexed.at("paths").pairs()}
        for shelf in ("parameters", "buffers"):
            for part in indexed.at(shelf).items():
                held = self.tree.module(paths.get(part.is_a(str), ""))
                if not isinstance(held, TaskIndexedParameter) or held.buffer != (shelf == "buffers"):
                    raise part.wrong(repr(part.data[:100]), "a name with task copies")
        return paths

    def _selection(self, fields: Fields, number: int, gates: Mapping[str, Tensor], file: str) -> Tensor:
        """The value of a buffer that the graph took for known."""
        owner, _, name = fields.is_a(str).rpartition(".")
        module, value = self.tree.module(owner), gates.get(f"selections.{number}")
        buffer = None if module is None else module._buffers.get(name)
        fits = buffer is not None and value is not None and value.shape == buffer.shape
        # the buffer may be stored as another floating-point type
        if not fits or (value.dtype != buffer.dtype and not (value.is_floating_point() and buffer.dtype.is_floating_point)):
            raise fields.wrong(repr(fields.data[:100]), f"a buffer, and its value in {file}")
        return value

    def _named(self, fields: Fields) -> list[str]:
        """Names of tensors that are there."""
        for part in fields.items():
            owner, _, name = part.is_a(str).rpartition(".")
            module = self.tree.module(owner)
            if module is None or (name not in module._parameters and name not in module._buffers):
                raise part.wrong(repr(part.data[:100]), "the name of a tensor")
        return list(fields.data)

    def _made(self) -> HATModel:
        hat = HATModel(self.tree.root, self.graphs["eval"], self.graphs.get("train"), self.facts)
        report, proof = self.fields.at("report"), self.fields.at("verification")
        if report.data is not None:
            hat.report = report.decoded(REPORT, "a report")
        if proof.data is not None:
            hat.verification = proof.decoded(PROOF, "a proof")
        return hat

    def fill(self, key: str, tensor: Tensor) -> None:
        """Takes a stored tensor."""
        self.tree.fill(key, tensor)

    def filled(self) -> None:
        """When all tensors are there."""
        root = self.tree.root
        self.model._parameters.update(root._parameters)  # those of the top: the model has shelves of its own
        self.model._buffers.update(root._buffers)
        self.tree.layers.filled(self.tree.modules())


def _check_calls(fields: Fields, graphs: Mapping[str, Any], outputs: Mapping[str, Structure], inputs: int) -> None:
    """Every graph takes as many values as the call has, and gives as many as the result has."""
    for mode, graph in graphs.items():
        nodes = list(graph.nodes)
        taken, given = sum(n.op == "placeholder" for n in nodes), len(nodes[-1].args[0])
        part = fields.at("graphs").at(mode)
        if taken != inputs:
            raise part.wrong(f"{taken} inputs", str(inputs))
        if given != outputs[mode].leaves:
            raise part.wrong(f"{given} results", str(outputs[mode].leaves))


def _check_modes(fields: Fields, graphs: Mapping[str, Any]) -> None:
    if [*graphs] not in (["eval"], ["eval", "train"]):
        raise fields.at("graphs").wrong(str([*graphs])[:80], "eval, and train where it differs")


def _recipe_head(fields: Fields, classes: Mapping[str, type]) -> Recipe:
    fields.only("was", "graphs", "outputs", "signature", "sizes", "meaning")
    signature = signature_from(fields.at("signature"), classes)
    outputs = {mode: structure_from(part, classes) for mode, part in fields.at("outputs").pairs()}
    if [*outputs] != [*fields.at("graphs").is_a(dict)]:
        raise fields.at("outputs").wrong(str([*outputs])[:80], "one for each graph")
    return Recipe(
        fields.get("was", str),
        {},
        outputs,
        signature,
        _sizes_from(fields.at("sizes"), signature.names),
        meaning_from(fields.at("meaning")),
    )


def _recipe_body(recipe: Recipe, fields: Fields, users: Sequence[nn.Module]) -> None:
    """Its graphs, over the tensors and modules of those that use it."""
    for mode, part in fields.at("graphs").pairs():
        recipe.graphs[mode] = graph_from(part, users[0], BY_ITEM)
        for user in users[1:]:
            check_places(part, recipe.graphs[mode], user, BY_ITEM)
    _check_modes(fields, recipe.graphs)
    _check_calls(fields, recipe.graphs, recipe.outputs, len(recipe.signature.names))
