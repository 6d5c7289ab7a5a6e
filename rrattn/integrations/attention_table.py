"""Model libraries whose attention layers look functions up in a table: PaddleFormers, and PaddleFleet's `transformers`.

They read `config._attn_implementation` at every forward and call the table's function of that name. This file adds
"rrattn" to such a table, so that

    model.config._attn_implementation = "rrattn"

runs with the settings of the model's config (or the defaults), as they are at each call, and `enable(model, config)`
with chosen ones. `enable` sets the flag for that model alone, also where others share its config.

What a model's attention layers are is read from their code (`table_lookup.py`): those that look something up in the
table and have a number, `layer_idx`. A tower for pictures looks up the same table, but its layers have no number.

Some layers follow the flag late or not at all: ERNIE's read it once, when the model is built; Gemma 3's fall back to
"sdpa" by name; others look nothing up. An enabled layer runs rrattn whatever name it asks the table for. Where only the
flag was set, rrattn would not run although the flag says so, or another function would run without the causal mask,
which the libraries leave out wherever the flag is not "eager". So the table's other functions refuse such a layer, and
a model raises an error, after its first call, when none of its layers came here.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Callable

from .common import (
    Place,
    attend,
    core_of,
    fleet_rank,
    is_enabled,
    make_core,
    refuse_settings,
    report,
    set_cores,
    settings_of,
)
from .model_library import ModelLibrary, OwnFlag
from .own_flag import is_view, shared_of
from .table_lookup import add_table, caller, functions_to_replace, package_of_table

if TYPE_CHECKING:
    from types import ModuleType

    from paddle import Tensor
    from paddle.nn import Layer

    from ..config import RRAttentionConfig, Settings
    from ..layer import RRAttention
    from .model_library import ModelT

NAME = "rrattn"
FLAG = "_attn_implementation"

# Fields of a model's config that rrattn does not support above these values.
_UNSUPPORTED_CONFIG = {"context_parallel_size": 1, "sep_parallel_size": 1}
_WHY_UNSUPPORTED = (
    "layers that look up the table attend the tokens of their own rank alone, with any attention function, although "
    "the trainer splits the sequences; PaddleFleet's GPTModel has context parallelism"
)
# Arguments that add nothing to the tensors and masks: positions are in the queries and keys, a window in the mask.
_WITHOUT_EFFECT = (
    "position_ids",
    "cache_position",
    "sliding_window",
    "return_dict",
    "use_cache",
    "output_hidden_states",
)
_LAYER_FLAG = "attn_implementation"  # of layers that read the config's flag once, when they are built
_SETTINGS = "_rrattn_settings"  # of a core that was made by the flag: what the layer's config said then

_in_a_model = ContextVar("rrattn: in the call of a model", default=False)
_came_here: weakref.WeakSet[Layer] = weakref.WeakSet()  # models that were seen to run rrattn by their config's flag


class AttentionTableLibrary(ModelLibrary):
    """A library with a table of attention functions.

    Parameters
    ----------
    package : str
        Of the library; `package.nn.attention.interface` has the table.
    name : str
        As messages call it.
    families : frozenset of str
        Model types that rrattn is tested with. Others get a warning.
    """

    def __init__(self, package: str, name: str, families: frozenset[str]) -> None:
        self.package = package
        self.name = name
        self.families = families
        self._last_report: tuple[weakref.ref[Any], RRAttentionConfig] | None = None

    # The flag

    def register(self, interface_module: ModuleType) -> None:
        """Adds "rrattn" to the table in `nn.attention.interface`, and guards what else is in it."""
        table = interface_module.AttentionInterface
        add_table(table, self.package)
        table.register(NAME, self.rrattn_attention_forward)
        lookup = table.__getitem__

        def guarded_lookup(own: Any, name: str) -> Callable[..., Any]:
            function: Callable[..., Any] = lookup(own, name)
            return function if name == NAME else functools.partial(self._other_attention, name, function)

        table.__getitem__ = guarded_lookup

    def _other_attention(
        self, _name: str, _function: Callable[..., Any], module: Layer, *args: Any, **kwargs: Any
    ) -> Any:
        """Calls another attention function of the table, unless the layer's config says that rrattn runs."""
        layer = caller(module)
        if getattr(getattr(layer, "config", None), FLAG, None) == NAME:
            if is_enabled(layer):
                return self.rrattn_attention_forward(layer, *args, **kwargs)
            raise ValueError(
                f"{FLAG} is {NAME!r}, but {type(layer).__name__} runs {_name!r}: it took its own from the config when "
                "the model was built, or does not follow the flag. rrattn.enable(model) switches it over"
            )
        core = core_of(layer)
        if core is not None:
            core.last_selection = None  # no longer what the layer attended last
        return _function(module, *args, **kwargs)

    def watch(self, model_module: ModuleType) -> None:
        """Makes calls of models in `transformers.model_utils` notice that the flag had no effect."""
        call = model_module.PretrainedModel.__call__

        @functools.wraps(call)
        def watched_call(own: Layer, *args: Any, **kwargs: Any) -> Any:
            flag = getattr(getattr(own, "config", None), FLAG, None)
            if flag != NAME or _in_a_model.get() or own in _came_here:
                return call(own, *args, **kwargs)
            token = _in_a_model.set(True)  # its parts need no attention of their own
            try:
                out = call(own, *args, **kwargs)
            finally:
                _in_a_model.reset(token)
            if all(core_of(layer) is None for layer in own.sublayers()):
                raise ValueError(
                    f"{FLAG} is {NAME!r}, but no attention layer of {type(own).__name__} looks it up: rrattn did not "
                    "run. rrattn.enable(model) switches over a model, or says why not"
                )
            _came_here.add(own)
            return out

        model_module.PretrainedModel.__call__ = watched_call

    def rrattn_attention_forward(
        self,
        module: Layer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_startend_row_indices: Tensor | None = None,
        dropout: float = 0.0,
        sink: Tensor | None = None,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, None]:
        """The attention function, in the table's calling convention.

        Parameters
        ----------
        module : paddle.nn.Layer
            The attention layer that calls. Where `enable` was not used, its RRAttention is made on the first call, and
            anew when the settings in its config have changed.
        query : Tensor
            [B, Hq, Lq, D], the last Lq positions of the keys; position embedding applied.
        key : Tensor
            [B, Hkv, Lk, D], the cache included.
        value : Tensor
            [B, Hkv, Lk, Dv].
        attention_mask : Tensor, optional
            [B, 1, Lq, Lk], additive or bool. It must be causal; padding, packing and sliding windows
            are read from it.
        attn_mask_startend_row_indices : Tensor, optional
            int32 [B, 1|Hkv, Lk, 1|2|4] or [B, 1|Hkv, Lk]: packed documents. One bound means causal, four mean
            not.
        dropout
            Not supported: anything but 0 is an error.
        sink : Tensor, optional
            [Hq], a logit for each head that joins the softmax without a value.
        scaling : float, optional
            Softmax scale. Default: 1 / sqrt(D).
        is_causal : bool, optional
            Default: the layer's is_causal, or True.
        kwargs
            Positions and the arguments of a model that its layers hand down have no effect. `sliding_window` has none
            either: a layer with a window gets a mask that says it. Anything else that is set, neither None nor False,
            is an error.

        Returns
        -------
        tuple of Tensor and None
            [B, Lq, Hq * Dv], and no attention weights.

        Raises
        ------
        ValueError
            For dropout, another argument that is set, a window that no mask says, a mask that rrattn cannot express,
            settings in the config that are not allowed; and where the layer's config does not say that rrattn runs, or
            another model's says it.
        """
        layer = caller(module)
        flag = getattr(getattr(layer, "config", None), FLAG, None)
        if flag != NAME == getattr(layer, _LAYER_FLAG, None):
            raise ValueError(
                f"{FLAG} is {flag!r}, but {type(layer).__name__} runs {NAME!r}: it does not follow the flag. Leave it "
                "to rrattn.enable(model) and rrattn.disable(model), or to the config that the model is built from"
            )
        core = self._core_of(layer)
        if dropout:
            raise ValueError(f"rrattn does not support attention dropout; set it to 0.0, got {dropout}")
        for name, given in kwargs.items():
            if name not in _WITHOUT_EFFECT and given is not None and given is not False:
                raise ValueError(f"rrattn does not support the attention argument {name}, got {_shown(given)}")
        if attention_mask is None and attn_mask_startend_row_indices is None:
            _refuse_unmasked_window(layer, kwargs.get("sliding_window"), key.shape[2])

        out = attend(
            core,
            query.transpose([0, 2, 1, 3]),  # [B, Lq, Hq, D], a view
            key.transpose([0, 2, 1, 3]),
            value.transpose([0, 2, 1, 3]),
            attention_mask,
            attn_mask_startend_row_indices,
            causal=getattr(layer, "is_causal", True) if is_causal is None else is_causal,
            softmax_scale=scaling,
            sink=None if sink is None else sink.astype("float32"),
        )
        return out.reshape([0, 0, out.shape[2] * out.shape[3]]), None

    # What ModelLibrary asks for

    def is_attention(self, layer: Layer) -> bool:
        """Whether a layer is an attention layer, of text or of pictures."""
        return package_of_table(layer) == self.package

    def attention_layers(self, model: Layer) -> list[Layer]:
        """Those of a decoder, which know their number; none of a tower for pictures."""
        found = [layer for layer in model.sublayers(include_self=True) if self.is_attention(layer)]
        layers = [layer for layer in found if _number(layer) is not None and hasattr(layer, "config")]
        layers = [layer for layer in layers if getattr(layer, "is_causal", True)] or layers
        if not layers:
            names = ", ".join(sorted({type(layer).__name__ for layer in found}))
            raise ValueError(
                f"found no attention layers in {type(model).__name__}: rrattn runs those that look up "
                f"{self.package}.nn.attention.interface and have a config and a layer_idx"
                + (f", which {names} lack" if names else "")
            )
        return sorted(layers, key=_number)  # type: ignore[arg-type]  # they have one

    def config_of(self, model: Layer) -> Any:
        """That of the attention layers: of the text, where a model is of pictures as well."""
        config = self.attention_layers(model)[0].config
        whole = getattr(model, "config", config)
        elsewhere = [name for name in vars(whole) if name.startswith("rrattn_")]
        if elsewhere and shared_of(whole) is not shared_of(config):
            raise ValueError(
                f"the config of {type(model).__name__} has {', '.join(elsewhere)}, which its attention layers do not "
                f"see: they belong into their config, of type {config.model_type!r}"
            )
        return config

    def place(self, layer: Layer) -> Place:
        config, number = layer.config, _number(layer)
        assert number is not None, "attention layers know their number"
        refuse_settings(config, _UNSUPPORTED_CONFIG, self.name, _WHY_UNSUPPORTED)
        ranks = getattr(config, "tensor_model_parallel_size", 1)
        return Place(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            ranks=ranks,
            rank=fleet_rank(ranks),
            layer_index=min(number, config.num_hidden_layers - 1),  # further ones predict tokens after the next
        )

    def replacements(self, layer: Layer) -> dict[str, object]:
        attributes = functions_to_replace(layer)
        return {**attributes, _LAYER_FLAG: NAME} if hasattr(layer, _LAYER_FLAG) else attributes

    def own_flag(self) -> OwnFlag:
        return OwnFlag(FLAG, NAME)

    def running_core(self, layer: Layer) -> RRAttention | None:
        runs = getattr(layer.config, FLAG) == NAME and (is_enabled(layer) or getattr(layer, _LAYER_FLAG, NAME) == NAME)
        return self._core_of(layer) if runs else None

    def enable(self, model: ModelT, config: RRAttentionConfig | None, settings: Settings) -> ModelT:
        super().enable(model, config, settings)
        self._warn_of(self.config_of(model).model_type)
        return model

    def log(self, line: str) -> None:
        self._logger().info(line)

    def _logger(self) -> Any:
        return importlib.import_module(f"{self.package}.utils.log").logger

    def _warn_of(self, model_type: str) -> None:
        """Says that a family of models is not among the tested ones."""
        if model_type not in self.families:
            self._logger().warning(
                f"rrattn is not tested with {model_type} models of {self.name}: their attention layers look up the "
                "same table as those of tested families. Compare threshold 1 with the model's own attention"
            )

    # RRAttention by the flag

    def _core_of(self, layer: Layer) -> RRAttention:
        """The layer's RRAttention: as `enable` made it, or by what the config says now."""
        core = core_of(layer)
        if core is not None and is_enabled(layer):
            return core
        if not hasattr(layer, "config") or _number(layer) is None:
            raise ValueError(
                f"{type(layer).__name__} has no config and layer_idx, by which rrattn knows its settings. Set {FLAG} "
                "in the config of the text alone where this is a tower for pictures; otherwise rrattn.enable(model) "
                "switches the model over, or says why not"
            )
        if is_view(layer.config):
            raise ValueError(
                f"this {layer.config.model_type} model was built from the config of a model that rrattn is enabled on: "
                "enable rrattn on it as well, or build it from a copy of that config"
            )
        settings = settings_of(layer.config)
        if core is None or settings != vars(core).get(_SETTINGS):
            place = self.place(layer)
            assert place.layer_index is not None, "attention layers know their number"
            core = make_core(settings, place, place.layer_index)
            vars(core)[_SETTINGS] = settings
            set_cores([layer], [core])
            self._report_once(layer.config, settings)
        return core

    def _report_once(self, config: Any, settings: RRAttentionConfig) -> None:
        """Logs what the flag runs, for the first layer of a model and not for each."""
        last = self._last_report
        if last is None or last[0]() is not config or last[1] != settings:
            num_layers = config.num_hidden_layers
            self.log(report(f"a {config.model_type} model", self.name, settings, range(num_layers), num_layers))
            self._warn_of(config.model_type)
            self._last_report = weakref.ref(config), settings


def _number(layer: Layer) -> int | None:
    """The number of an attention layer in its model; None where it has none."""
    number = getattr(layer, "layer_idx", None)
    return number if isinstance(number, int) else None


def _refuse_unmasked_window(layer: Layer, window: Any, seqlen_k: int) -> None:
    """Raises ValueError for a layer that is to see a part of the keys, when no mask says which.

    No function of the table reads the argument `sliding_window`: layers of full attention pass it as well, with the
    config's value, and those with a window have a mask.
    """
    config, number = layer.config, layer.layer_idx
    kinds = getattr(config, "layer_types", None) or ()
    kind = kinds[number] if number < len(kinds) else None
    if kind == "full_attention":
        return
    if kind is not None:
        window = getattr(config, "sliding_window", None)
    if window is not None and seqlen_k > window:
        raise ValueError(
            f"{type(layer).__name__} {number} has a sliding_window of {window}, but neither attention_mask nor "
            f"attn_mask_startend_row_indices says so for its {seqlen_k} keys"
        )


def _shown(given: object) -> str:
    """A value in a message, of a tensor its shape."""
    return f"a tensor of shape {list(given.shape)}" if hasattr(given, "shape") else repr(given)
