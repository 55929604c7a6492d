"""Reading a network's intermediate features by node name, through torchvision's feature extraction."""

import contextlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from kd.errors import UserError
from kd.models.classifier import Classifier, Description
from kd.registry import suggestion

MapShape = tuple[int, int, int]

_MAX_PREFIX_TOKENS = 16
_SURVEY_BATCH = 2
# Operations that only change the shape: their three-dimensional outputs may have channels before positions.
_RESHAPES = re.compile(r"(flatten|reshape|view|transpose|permute|swapaxes|getitem|contiguous)(_\d+)?$")
_TOKEN_DIMS = 3
_SHOWN = 8


@dataclass(frozen=True)
class Survey:
    """The nodes of a network.

    Args:
        architecture: The network's name.
        shapes: ``(C, H, W)`` of each feature map (see :func:`as_map`) by node, in the order of computation.
        others: The nodes whose outputs aren't feature maps.
        logits: The node of the logits in training mode and in evaluation mode.
        in_training: All nodes in training mode.
        stages: The last feature map of each stage, from the largest to the smallest. A stage is the part of the network
            between two changes of size; nodes on parallel branches don't count.
    """

    architecture: str
    shapes: Mapping[str, MapShape]
    others: Sequence[str]
    logits: tuple[str, str]
    in_training: frozenset[str]
    stages: tuple[str, ...]

    def find(self, name: str) -> str:
        """Return the node of that name, or the last feature map in the module of that name."""
        nodes = [*self.shapes, *self.others]
        within = [node for node in nodes if node == name or node.startswith(f"{name}.")]
        if not within:
            modules = {node[: match.start()] for node in nodes for match in re.finditer(r"\.", node)}
            stages = f"; its stages end in {', '.join(self.stages)}" if self.stages else ""
            raise UserError(
                f"{self.architecture} has no node {name!r}{suggestion(name, [*nodes, *sorted(modules)])}{stages}"
            )
        maps = [node for node in within if node in self.shapes]
        if not maps:
            raise UserError(f"{self.architecture}: the output of node {name!r} is not a feature map")
        return maps[-1]

    def last(self) -> str:
        """Return the last feature map before the pooling."""
        if not self.stages:
            nodes = list(self.shapes)
            shown = ["...", *nodes[-_SHOWN:]] if len(nodes) > _SHOWN else nodes
            raise UserError(f"{self.architecture} has no last feature map; name a node ({', '.join(shown)})")
        return self.stages[-1]


def as_map(features: Tensor) -> Tensor:
    """Return features as a map ``(B, C, H, W)`` of square images; raise a ``ValueError`` if that is impossible.

    Args:
        features: A map ``(B, C, H, W)`` or ``(B, H, W, C)``; tokens ``(B, N, C)``, without the class tokens and
            registers that precede the largest square number of tokens; or a vector ``(B, C)``, a map of one pixel.
    """
    shape = tuple(features.shape)
    channels, height, _ = _map_shape(shape[1:])
    if len(shape) == 3:  # noqa: PLR2004 (tokens)
        return features[:, shape[1] - height**2 :].transpose(1, 2).reshape(shape[0], channels, height, height)
    if len(shape) == 4 and shape[2] != shape[3]:  # noqa: PLR2004 (channels last)
        return features.permute(0, 3, 1, 2)
    return features.reshape(shape[0], channels, height, height)


def _map_shape(shape: tuple[int, ...]) -> MapShape:
    match shape:
        case (channels, height, width) if height == width:
            return channels, height, width
        case (height, width, channels) if height == width:
            return channels, height, width
        case (tokens, channels) if tokens - math.isqrt(tokens) ** 2 <= _MAX_PREFIX_TOKENS:
            return channels, math.isqrt(tokens), math.isqrt(tokens)
        case (channels,):
            return channels, 1, 1
    raise ValueError(f"features of shape {shape} per image are not a feature map")


_SURVEYS: dict[Description, Survey] = {}


def survey(classifier: Classifier) -> Survey:
    """List the nodes of a network with their shapes, once for all networks of the same description.

    Raises:
        UserError: If torch.fx can't trace it.
    """
    if classifier.description not in _SURVEYS:
        _SURVEYS[classifier.description] = _survey(classifier)
    return _SURVEYS[classifier.description]


def _survey(classifier: Classifier) -> Survey:
    architecture, size = classifier.description.architecture, classifier.description.image_size
    with _tracing(architecture):
        train_nodes, eval_nodes = get_graph_node_names(
            classifier.network, tracer_kwargs=_tracer_options(), suppress_diff_warning=True
        )
    extractor = _extractor(classifier, train_nodes, eval_nodes).eval()
    mode, images = classifier.training, torch.zeros(_SURVEY_BATCH, 3, size, size)
    # torch.fx prints an error besides raising it.
    with torch.no_grad(), _tracing(architecture), contextlib.redirect_stderr(io.StringIO()):
        values = extractor(classifier.normalization(images))
    with torch.no_grad():
        logits = classifier.eval()(images)
    classifier.train(mode)
    if not torch.equal(classifier.select(values[eval_nodes[-1]]), logits):
        raise UserError(f"{architecture}: its features can't be read, as its last node is not its logits")
    nodes = {name: node for node, name in _names(extractor.eval_graph).items()}
    computed = [name for name in values if nodes[name].op not in ("placeholder", "get_attr")]
    shapes = {name: shape for name in computed if (shape := _shape_of_map(values[name])) is not None}
    others = [name for name in computed if name not in shapes]
    stages: dict[int, str] = {}
    for node in _passed_by_all(extractor.eval_graph, values):
        _, height, _ = shapes.get(node, (0, 0, 0))
        value = values[node]
        if isinstance(value, Tensor) and value.ndim == _TOKEN_DIMS and _RESHAPES.search(node):
            continue
        # Sizes decrease; a larger one is a detail of windows or attention.
        if 1 < height <= min(stages, default=height):
            stages[height] = node
    return Survey(
        architecture, shapes, others, (train_nodes[-1], eval_nodes[-1]), frozenset(train_nodes), tuple(stages.values())
    )


def _shape_of_map(value: object) -> MapShape | None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape[:1] != (_SURVEY_BATCH,):
        return None
    try:
        return _map_shape(tuple(value.shape)[1:])
    except ValueError:
        return None


class FeatureReader:
    """Computes the logits of a batch and the feature maps at some nodes in one pass.

    It shares the network's weights and follows its mode. It isn't a ``torch.nn.Module``, so that a module that holds it
    doesn't register the network twice.

    Args:
        classifier: The network.
        nodes: Names of nodes, as returned by :meth:`Survey.find`.

    Raises:
        UserError: If torch.fx can't trace the network, or it lacks a node in training mode.
    """

    def __init__(self, classifier: Classifier, nodes: Sequence[str]) -> None:
        self.nodes = tuple(nodes)
        self._classifier = classifier
        nodes_of = survey(classifier)
        self._logits = nodes_of.logits
        for node in self.nodes:
            if node not in nodes_of.in_training:
                raise UserError(f"{nodes_of.architecture} has node {node!r} in evaluation mode only, not in training")
        self._extractor = _extractor(classifier, *([*self.nodes, logits] for logits in self._logits))
        _disable_inplace(classifier.network, self._extractor)

    def to(self, *, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move the extractor's own state: buffers that the network uses outside of a module."""
        self._extractor.to(device=device, dtype=dtype)

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits ``(B, C)`` and maps ``(B, C', H, W)`` by node, for images ``(B, 3, S, S)`` in [0, 1]."""
        training = self._classifier.training
        if self._extractor.training != training:
            self._extractor.train(training)
        values = self._extractor(self._classifier.normalization(images))
        logits = self._classifier.select(values[self._logits[not training]])
        return logits, {node: as_map(values[node]) for node in self.nodes}


def split_at(classifier: Classifier, node: str) -> tuple[nn.Module, fx.GraphModule]:
    """Split a network at a node, in evaluation mode for the second part.

    Args:
        classifier: The network; both parts share its weights.
        node: A node on every path to the logits.

    Returns:
        The network up to the node, which returns its features by name, and the rest, from the features to the outputs.

    Raises:
        UserError: If the rest needs more than the features.
    """
    logits = survey(classifier).logits
    extractor = _extractor(classifier, [node, logits[0]], [node, logits[1]])
    named = {name: each for each, name in _names(extractor.eval_graph).items()}
    graph = fx.Graph()
    copies = {named[node]: graph.placeholder("features")}
    needed, open_nodes = set[fx.Node](), [named[logits[1]]]
    while open_nodes:
        each = open_nodes.pop()
        if each not in copies and each not in needed:
            needed.add(each)
            open_nodes += each.all_input_nodes
    for each in extractor.eval_graph.nodes:
        if each in needed:
            if each.op == "placeholder":
                raise UserError(f"{classifier.description.architecture}: what follows {node} depends on more than it")
            copies[each] = graph.node_copy(each, copies.__getitem__)
    graph.output(copies[named[logits[1]]])
    return _extractor(classifier, [node], [node]), fx.GraphModule(extractor, graph)


def _extractor(classifier: Classifier, train_nodes: Sequence[str], eval_nodes: Sequence[str]) -> Any:  # noqa: ANN401
    with _tracing(classifier.description.architecture):
        return create_feature_extractor(
            classifier.network,
            train_return_nodes={node: node for node in train_nodes},
            eval_return_nodes={node: node for node in eval_nodes},
            tracer_kwargs=_tracer_options(),
            suppress_diff_warning=True,
        )


@contextlib.contextmanager
def _tracing(architecture: str) -> Iterator[None]:
    """Report that a network can't be traced: torch.fx passes on whatever the network raises."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{architecture}: its features can't be read, as torch.fx can't trace it: {reason}") from error


def _tracer_options() -> dict[str, Any]:
    """Return the modules and functions that are not traced into; timm lists its own."""
    try:
        from timm import models
    except ImportError:
        return {"leaf_modules": [nn.MultiheadAttention]}
    modules, functions = models.get_notrace_modules(), models.get_notrace_functions()  # type: ignore[no-untyped-call]
    return {"leaf_modules": [nn.MultiheadAttention, *modules], "autowrap_functions": list(functions)}


def _disable_inplace(network: nn.Module, extractor: Any) -> None:  # noqa: ANN401 (torchvision's)
    """Keep operations from overwriting the features before them; it costs memory, but changes no result."""
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # typed as a tensor by torch.nn.Module
    for graph in (extractor.train_graph, extractor.eval_graph):
        for node in graph.nodes:
            if node.kwargs.get("inplace"):
                node.update_kwarg("inplace", False)
    extractor.recompile()


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Return the names of the nodes: the output node of an extractor maps each name to its node."""
    return {node: name for name, node in next(iter(reversed(graph.nodes))).args[0].items()}


def _passed_by_all(graph: fx.Graph, values: Mapping[str, object]) -> list[str]:
    """List the nodes on every path from the image to the logits, in the order of computation."""
    nodes, names = list(graph.nodes), _names(graph)
    position = {node: index for index, node in enumerate(nodes)}
    furthest = 0
    passed: list[str] = []
    for index, node in enumerate(nodes[:-1]):
        value = values.get(names.get(node, ""))
        if node in names and furthest <= index and isinstance(value, Tensor):
            passed.append(names[node])
        is_data = node.op == "placeholder" or isinstance(value, Tensor | tuple | list)
        if is_data and node.op != "get_attr":
            furthest = max([furthest, *(position[user] for user in node.users if user.op != "output")])
    return passed
