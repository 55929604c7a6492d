"""Reading a network's features by the names of their nodes, through torchvision's feature extraction."""

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

_MOST_PREFIX_TOKENS = 16
_TRIED_ON = 2
# What changes the shape alone: of three dimensions, what it gives may as well have its channels before its places.
_RESHAPES = re.compile(r"(flatten|reshape|view|transpose|permute|swapaxes|getitem|contiguous)(_\d+)?$")
_TOKEN_DIMS = 3
_SHOWN = 8


@dataclass(frozen=True)
class Survey:
    """The nodes of a network that hold features.

    Args:
        architecture: The network, as a person named it.
        shapes: ``(C, H, W)`` of what each node gives, as a map (see :func:`as_map`), in the order of computation.
        others: The nodes that give something else, and what that is.
        logits: The node that gives the logits, when the network is in training and when it is evaluated.
        in_training: All nodes that there are in training.
        stages: The last map of each stage, from the largest to the smallest; a stage is what lies between two changes
            of the size. Only nodes count that all the computation passes through, so that it is not some branch.
    """

    architecture: str
    shapes: Mapping[str, MapShape]
    others: Mapping[str, str]
    logits: tuple[str, str]
    in_training: frozenset[str]
    stages: tuple[str, ...]

    def find(self, name: str) -> str:
        """Return the node of that name, or the last one within the module of that name.

        Raises:
            UserError: If there is none, or it gives nothing that can be taken as a map.
        """
        known = [*self.shapes, *self.others]
        within = [node for node in known if node == name or node.startswith(f"{name}.")]
        if not within:
            modules = {node[: match.start()] for node in known for match in re.finditer(r"\.", node)}
            there_are = f"; its stages end in {', '.join(self.stages)}" if self.stages else ""
            raise UserError(
                f"{self.architecture} has no node {name!r}{suggestion(name, [*known, *sorted(modules)])}{there_are}"
            )
        maps = [node for node in self.shapes if node in within]
        if not maps:
            raise UserError(f"{self.architecture}: node {name!r} gives {self.others[within[-1]]}, and no features")
        return maps[-1]

    def last(self) -> str:
        """Return the last map before the pooling.

        Raises:
            UserError: If no node holds a map.
        """
        if not self.stages:
            nodes = list(self.shapes)
            some = ["...", *nodes[-_SHOWN:]] if len(nodes) > _SHOWN else nodes
            raise UserError(f"{self.architecture} has no map that all goes through; name a node ({', '.join(some)})")
        return self.stages[-1]


def as_map(features: Tensor) -> Tensor:
    """Return features as a map ``(B, C, H, W)``.

    Args:
        features: A map ``(B, C, H, W)``; one with its channels last, ``(B, H, W, C)``; tokens ``(B, N, C)``, of which
            the last N that make a square are taken (those before them are class tokens and registers); or a vector
            ``(B, C)``, which becomes a map of one pixel. The images are square.

    Raises:
        ValueError: If it is none of these.
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
        case (tokens, channels) if tokens - math.isqrt(tokens) ** 2 <= _MOST_PREFIX_TOKENS:
            return channels, math.isqrt(tokens), math.isqrt(tokens)
        case (channels,):
            return channels, 1, 1
    raise ValueError(f"features of shape {shape} for an image are no map")


_SURVEYS: dict[Description, Survey] = {}


def survey(classifier: Classifier) -> Survey:
    """List the nodes of a network with what they give, and find the last map of each stage.

    Args:
        classifier: The network; it is tried on two black images, once for all networks of its description.

    Raises:
        UserError: If torch.fx can't trace it.
    """
    if classifier.description not in _SURVEYS:
        _SURVEYS[classifier.description] = _survey(classifier)
    return _SURVEYS[classifier.description]


def _survey(classifier: Classifier) -> Survey:
    architecture, size = classifier.description.architecture, classifier.description.image_size
    options = _tracer_options()
    with _tracing(architecture):
        train_nodes, eval_nodes = get_graph_node_names(
            classifier.network, tracer_kwargs=options, suppress_diff_warning=True
        )
    extractor = _extractor(classifier, train_nodes, eval_nodes).eval()
    mode, images = classifier.training, torch.zeros(_TRIED_ON, 3, size, size)
    # torch.fx prints what went wrong besides raising it.
    with torch.no_grad(), _tracing(architecture), contextlib.redirect_stderr(io.StringIO()):
        values = extractor(classifier.normalization(images))
    with torch.no_grad():
        logits = classifier.eval()(images)
    classifier.train(mode)
    if not torch.equal(values[eval_nodes[-1]], logits):
        raise UserError(
            f"{architecture}: its features can't be read, as the last node that was traced is not its logits"
        )
    nodes = {name: node for node, name in _names(extractor.eval_graph).items()}
    computed = {name: value for name, value in values.items() if nodes[name].op not in ("placeholder", "get_attr")}
    shapes: dict[str, MapShape] = {}
    others: dict[str, str] = {}
    for node, value in computed.items():
        shape = _shape_of_map(value)
        if shape is not None:
            shapes[node] = shape
        elif isinstance(value, Tensor):
            others[node] = f"shape {tuple(value.shape)} for two images"
        else:
            others[node] = f"a {type(value).__name__}"
    stages: dict[int, str] = {}
    for node in _passed_by_all(extractor.eval_graph, values):
        _, height, _ = shapes.get(node, (0, 0, 0))
        value = values[node]
        if isinstance(value, Tensor) and value.ndim == _TOKEN_DIMS and _RESHAPES.search(node):
            continue
        # The sizes go down; what is larger again is a window's or an attention's own.
        if 1 < height <= min(stages, default=height):
            stages[height] = node
    return Survey(
        architecture=architecture,
        shapes=shapes,
        others=others,
        logits=(train_nodes[-1], eval_nodes[-1]),
        in_training=frozenset(train_nodes),
        stages=tuple(stages.values()),
    )


def _shape_of_map(value: object) -> MapShape | None:
    """Return the shape of what a node gave for the images that were tried, if it is a map."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape[:1] != (_TRIED_ON,):
        return None
    try:
        return _map_shape(tuple(value.shape)[1:])
    except ValueError:
        return None


class FeatureReader:
    """Answers a batch with the logits and the features at some nodes, in one pass.

    It shares the network's weights and follows its mode; it is no ``torch.nn.Module``, so that a module that holds it
    does not hold the network twice.

    Args:
        classifier: The network.
        nodes: The nodes to read, as :meth:`Survey.find` returned them.

    Raises:
        UserError: If torch.fx can't trace the network, or it lacks a node when it is in training.
    """

    def __init__(self, classifier: Classifier, nodes: Sequence[str]) -> None:
        self.nodes = tuple(nodes)
        self._classifier = classifier
        known = survey(classifier)
        self._logits = known.logits
        for node in self.nodes:
            if node not in known.in_training:
                raise UserError(f"{known.architecture} has no node {node!r} in training, only in evaluation")
        wanted = [list(dict.fromkeys([*self.nodes, last])) for last in self._logits]
        self._extractor = _extractor(classifier, *wanted)
        _keep_what_nodes_gave(classifier.network, self._extractor)

    def to(self, *, device: torch.device, dtype: torch.dtype | None = None) -> None:
        """Move what it holds of its own: buffers that the network uses outside of a module."""
        self._extractor.to(device=device, dtype=dtype)

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Answer ``(B, 3, S, S)`` in [0, 1] with logits ``(B, C)`` and maps ``(B, C', H, W)`` by node."""
        training = self._classifier.training
        if self._extractor.training != training:
            self._extractor.train(training)
        values = self._extractor(self._classifier.normalization(images))
        return values[self._logits[not training]], {node: as_map(values[node]) for node in self.nodes}


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
    """Say in words that a network can't be traced: torch.fx lets anything through that the network raises."""
    try:
        yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{architecture}: its features can't be read, as torch.fx can't trace it: {reason}") from error


def _tracer_options() -> dict[str, Any]:
    """Return what stays whole when a network is traced; timm keeps a list of what in its networks can't be traced."""
    try:
        from timm import models
    except ImportError:
        return {"leaf_modules": [nn.MultiheadAttention]}
    # It has not typed them.
    modules, functions = models.get_notrace_modules(), models.get_notrace_functions()  # type: ignore[no-untyped-call]
    return {"leaf_modules": [nn.MultiheadAttention, *modules], "autowrap_functions": list(functions)}


def _keep_what_nodes_gave(network: nn.Module, extractor: Any) -> None:  # noqa: ANN401 (torchvision's)
    """Let no operation write over what the node before it gave; it costs memory, and changes no result."""
    for module in network.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]  # torch.nn.Module says that it is a tensor
    for graph in (extractor.train_graph, extractor.eval_graph):
        for node in graph.nodes:
            if node.kwargs.get("inplace"):
                node.update_kwarg("inplace", False)
    extractor.recompile()


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Return the names of the nodes: the output node of an extractor maps each name to its node."""
    return {node: name for name, node in next(iter(reversed(graph.nodes))).args[0].items()}


def _passed_by_all(graph: fx.Graph, values: Mapping[str, object]) -> list[str]:
    """List the nodes that every path from the image to the logits passes through, in the order of computation."""
    nodes, names = list(graph.nodes), _names(graph)
    position = {node: index for index, node in enumerate(nodes)}
    furthest = 0
    passed: list[str] = []
    for index, node in enumerate(nodes[:-1]):
        value = values.get(names.get(node, ""))
        is_data = node.op == "placeholder" or isinstance(value, Tensor | tuple | list)
        if node in names and furthest <= index and isinstance(value, Tensor):
            passed.append(names[node])
        if is_data and node.op != "get_attr":
            furthest = max([furthest, *(position[user] for user in node.users if user.op != "output")])
    return passed
