"""What rrattn has to know of a model library, and `enable` and `disable` over it."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .common import (
    Place,
    core_of,
    is_enabled,
    layer_indices,
    make_core,
    refuse_observed,
    report,
    restore,
    set_cores,
    settings_of,
    swap_in,
)
from .own_flag import give_own_flag, take_own_flag

if TYPE_CHECKING:
    from paddle.nn import Layer

    from ..config import RRAttentionConfig, Settings
    from ..layer import RRAttention

    ModelT = TypeVar("ModelT", bound=Layer)


class OwnFlag(NamedTuple):
    """A flag in the config of attention layers that says whether rrattn runs."""

    name: str
    """Attribute of the configs."""
    value: object
    """What `enable` sets it to, for one model alone; `disable` brings back what it was."""


class ModelLibrary(abc.ABC):
    """A model library, by what its subclass in `rrattn.integrations.<package of the library>` says of it.

    `enable` finds the attention layers of a model, makes an RRAttention for each by its place, gives it to the layer,
    and sets the attributes by which the layer calls it, and the flag. `disable` brings back what was there. What may
    fail comes before anything is changed.
    """

    name: str
    """As messages call it."""

    @abc.abstractmethod
    def attention_layers(self, model: Layer) -> list[Layer]:
        """The attention layers of a model or of a part of one, in order; each has the model's config as `config`.

        Raises
        ------
        ValueError
            Where there is none, with what is supported.
        """

    @abc.abstractmethod
    def place(self, layer: Layer) -> Place:
        """Where an attention layer is in its model, and among the ranks that share its heads.

        Raises
        ------
        ValueError
            For what the model's config asks for and rrattn cannot do.
        """

    @abc.abstractmethod
    def log(self, line: str) -> None:
        """Writes a line where the library's own notes go."""

    def config_of(self, model: Layer) -> Any:
        """The config of a model that is to be enabled, where its settings `rrattn_...` stand.

        Raises
        ------
        ValueError
            For a model that is not supported.
        """
        return self.attention_layers(model)[0].config

    def replacements(self, layer: Layer) -> dict[str, object]:
        """The attributes that a layer gets while it is enabled, so that its RRAttention is called in its attention.

        `swap_in` puts them there, and `restore` what was there before. Empty where the layer calls it anyway.

        Raises
        ------
        ValueError
            For a layer that rrattn does not know.
        """
        return {}

    def own_flag(self) -> OwnFlag | None:
        """The flag in the config of an enabled model; None for a library without one."""
        return None

    def running_core(self, layer: Layer) -> RRAttention | None:
        """The RRAttention that a layer would call now, by its flag too; None where it would call none."""
        return core_of(layer)

    def enable(self, model: ModelT, config: RRAttentionConfig | None, settings: Settings) -> ModelT:
        """`rrattn.enable`; where the config is None, with settings that come before those in the model's config."""
        model_config = self.config_of(model)
        if config is None:
            config = settings_of(model_config, settings)
        layers = self.attention_layers(model)
        places = [self.place(layer) for layer in layers]
        indices = layer_indices(places, config, type(model).__name__)
        cores = [make_core(config, place, index) for place, index in zip(places, indices)]
        others = [layer for layer in layers if not is_enabled(layer)]
        replacements = [self.replacements(layer) for layer in others]
        flag = self.own_flag()
        refuse_observed(layers)
        if flag is not None:
            give_own_flag(model, [layer.config for layer in layers], *flag, keep=len(others) < len(layers))
        set_cores(layers, cores)  # nothing from here on fails
        for layer, attributes in zip(others, replacements):
            swap_in(layer, attributes)
        self.log(report(type(model).__name__, self.name, config, indices, places[0].num_layers))
        return model

    def disable(self, model: ModelT) -> ModelT:
        """`rrattn.disable`."""
        layers = [layer for layer in self.attention_layers(model) if is_enabled(layer)]
        if not layers:
            raise ValueError("rrattn is not enabled on this model")
        set_cores(layers, [None] * len(layers))
        for layer in layers:
            restore(layer)
        take_own_flag(model)
        return model

    def attention_cores(self, model: Layer) -> list[RRAttention | None]:
        """`rrattn.integrations.attention_cores`."""
        return [self.running_core(layer) for layer in self.attention_layers(model)]
