"""What a scheme needs to know of a torch module: names, blocks, classifier, shifts, paddings."""

from __future__ import annotations

from torch import fx, nn
from torch.export import ExportedProgram

from pocktvm.errors import PockError
from pocktvm.frontend.exported import input_nodes, layer_of, operator_name, parameter_nodes

# Moving indices about does not change which rows of a table they may name.
CARRIES_INDICES = frozenset(
    "view.default reshape.default _unsafe_view.default slice.Tensor select.int clone.default "
    "_to_copy.default unsqueeze.default squeeze.dim squeeze.dims permute.default expand.default "
    "contiguous.default transpose.int to.dtype alias.default".split()
)
NORMS = ("_native_batch_norm_legit_no_training.default", "batch_norm.default")


def canonical_names(module: nn.Module) -> dict[str, str]:
    """Every parameter name -> the first name of the same tensor (tied weights)."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(parameter), name)
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """Children of the longest ModuleList/Sequential of composite modules; the outermost of equals.

    A child is composite when it has children of its own and parameters.
    """
    best: tuple[str, ...] = ()
    for path, container in module.named_modules():
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        names = tuple(
            f"{path}.{name}" if path else name
            for name, child in container.named_children()
            if _is_composite(child)
        )
        if len(names) > len(best):
            best = names
    return best


def _is_composite(module: nn.Module) -> bool:
    return any(True for _ in module.children()) and any(True for _ in module.parameters())


def find_classifier(
    program: ExportedProgram, module: nn.Module, blocks: tuple[str, ...]
) -> tuple[str, ...]:
    """Prefixes of the linear layers behind the last block; else of the last layer with weights.

    A norm or a 1×1 convolution between the last block and the first linear layer is a feature,
    not the classifier: `last` means what it means in the literature.
    """
    modules = dict(module.named_modules())
    behind = []
    for node in reversed(program.graph.nodes):
        path = layer_of(node)
        if blocks and (path == blocks[-1] or path.startswith(blocks[-1] + ".")):
            break
        owner = modules.get(path)
        weighty = owner is not None and any(True for _ in owner.parameters(recurse=False))
        if node.op == "call_function" and path and weighty and path not in behind:
            behind.append(path)
    linear = [path for path in behind if isinstance(modules[path], nn.Linear)]
    if not blocks:
        linear = linear[:1]
    return tuple(reversed(linear)) or tuple(behind[:1])


def find_shifts(program: ExportedProgram) -> dict[str, str]:
    """Convolution weight -> bias of the batch norm that reads the convolution."""
    names = {node: name for name, node in parameter_nodes(program).items()}
    shifts = {}
    for node in program.graph.nodes:
        if operator_name(node) not in NORMS:
            continue
        source, bias = node.args[0], node.args[2]
        if operator_name(source) == "convolution.default":
            weight = names.get(source.args[1])
            if weight and bias in names:
                shifts[weight] = names[bias]
    return shifts


def find_embeddings(program: ExportedProgram) -> tuple[dict[str, int], dict[str, int]]:
    """(table -> padding_idx, input name -> number of rows its ids may name)."""
    names = {node: name for name, node in parameter_nodes(program).items()}
    inputs = set(input_nodes(program))
    padding: dict[str, int] = {}
    plain: set[str] = set()
    bounds: dict[str, int] = {}
    for node in program.graph.nodes:
        if operator_name(node) != "embedding.default":
            continue
        table, ids = node.args[:2]
        rows = int(table.meta["val"].shape[0])
        source = _index_source(ids)
        if source in inputs:
            bounds[source.name] = min(rows, bounds.get(source.name, rows))
        if table not in names:
            continue
        index = node.args[2] if len(node.args) > 2 else -1
        name = names[table]
        if index < 0 or padding.setdefault(name, int(index)) != index:
            plain.add(name)
    mixed = sorted(plain & set(padding))
    if mixed:
        raise PockError(
            f"the table '{mixed[0]}' is looked up with different padding_idx; "
            "give every nn.Embedding that shares it the same one."
        )
    return padding, bounds


def _index_source(node: fx.Node) -> fx.Node:
    while operator_name(node) in CARRIES_INDICES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
