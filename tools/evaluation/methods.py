"""The ways to choose blocks that are compared, each from a short text.

dense                       every block
rrattn:0.95[:8]             rrattn at a threshold, with a stride (default 8) and without spread and least share
rrattn:stride=16,threshold=0.98     rrattn with any settings of RRAttentionConfig by name, its defaults for the others;
                            values are JSON: numbers, true, false, null, lists
rrattn:FILE.json            rrattn with the settings of a file (RRAttentionConfig.from_json)
xattention:0.95[:8]         antidiagonal scores, with a stride (default 8)
pooling:0.95                products of block means, as FlexPrefill's query-aware estimate
vertical-slash:0.95         columns and diagonals that the last queries attend, as MInference
window:16                   the first block and so many of the nearest
random:0.3                  each block with this chance
exact:0.95                  the true attention mass: what no selection can beat
group-mean:0.95[:8]         rrattn's estimate, changed: see baselines.sampled_scores; likewise row-maximum,
                            rotated-blocks, rotated-strides

A name with "+last", as in rrattn+last:0.95, keeps every block of the last query block row as well: the end of the
prompt, where its question is, attends all of it (rrattn's keep_last). With "+near" each row also keeps the block before
its diagonal (keep_local=1), both of which rrattn does by default. Without them neither rule is on.
"""

from __future__ import annotations

import json
import re

import numpy as np

import rrattn
from rrattn.arguments import STRIDES
from rrattn.config import SETTINGS, RRAttentionConfig

from . import baselines

WITHOUT_STRIDE = ("dense", "pooling", "vertical-slash", "window", "random", "exact")
WITH_STRIDE = ("rrattn", "xattention", *baselines.VARIANTS)
NAMES = WITHOUT_STRIDE + WITH_STRIDE


class Method:
    """One way to choose blocks; see the module for the texts.

    Attributes
    ----------
    name : str
        Of NAMES.
    knob : float or None
        The number that the text has, mostly a threshold; None where it has none.
    stride : int
        Where there is a knob.
    keep : dict
        Keep rules of a method with a knob, as `rrattn.select_blocks` takes them.
    config : RRAttentionConfig or None
        Of rrattn, all of its settings.

    Raises
    ------
    ValueError
        For a text that names no method, or a number that is not allowed.
    """

    def __init__(self, text):
        self.text = text
        name, *settings = text.split(":")
        self.name, *extras = name.split("+")
        if len(set(extras)) < len(extras) or not set(extras) <= {"last", "near"}:
            raise ValueError(f"method {text!r}: after a + may stand last and near, each once")
        self.keep = {"keep_last": "last" in extras, "keep_local": int("near" in extras)}
        if self.name not in NAMES:
            raise ValueError(f"method {text!r} is not one of {', '.join(NAMES)}")
        self.config = self.knob = None
        most = 0 if self.name == "dense" else 2 if self.name in WITH_STRIDE else 1
        if len(settings) > most or (self.name != "dense" and not settings):
            raise ValueError(f"method {text!r} must be written as {_form(self.name)}")
        if self.name == "dense":
            if extras:
                raise ValueError(f"method {text!r}: dense keeps every block anyway")
            return
        if self.name == "rrattn" and settings[0].endswith(".json"):
            self.config = RRAttentionConfig.from_json(settings[0])
            if len(settings) > 1 or extras:
                raise ValueError(f"method {text!r}: stride and keep rules are in the file, so must not be given")
            return
        if self.name == "rrattn" and "=" in settings[0]:
            if len(settings) > 1 or extras:
                raise ValueError(f"method {text!r}: give stride and keep rules by name as well")
            self.config = _config_of(text, settings[0])
            return
        try:
            self.knob = float(settings[0])
            self.stride = int(settings[1]) if len(settings) > 1 else 8
        except ValueError:
            raise ValueError(f"method {text!r} must be written as {_form(self.name)}") from None
        if self.name == "window":
            if self.knob < 1 or self.knob != int(self.knob):
                raise ValueError(f"method {text!r}: the window must be a whole number of blocks, 1 or more")
        elif not 0 < self.knob <= 1:
            raise ValueError(f"method {text!r}: {settings[0]} must be in (0, 1]")
        if self.stride not in STRIDES:
            raise ValueError(f"method {text!r}: the stride must be one of {', '.join(map(str, STRIDES))}")
        if self.name == "rrattn":
            off = {"spread": 0, "min_share": 0}
            self.config = RRAttentionConfig(threshold=self.knob, stride=self.stride, **self.keep, **off)

    @property
    def by_config(self):
        """Whether it is rrattn with settings that only a config says."""
        return self.config is not None and self.knob is None

    def block_mask(self, query, key, scale, layer, num_layers):
        """The blocks to attend, causal.

        Parameters
        ----------
        query, key : Tensor
            [1, Lq, Hq, D], the last positions of the keys, and [1, Lk, Hkv, D].
        scale : float or None
            Of the products; None: 1 / sqrt(D).
        layer, num_layers : int

        Returns
        -------
        Tensor
            int32 [1, Hq, Mq, ceil(Mk / 32)], see `rrattn.pack_block_mask`.
        """
        sizes = {"causal": True, "seqlen_q": query.shape[1], "seqlen_k": key.shape[1]}
        if self.name == "dense":
            return rrattn.dense_block_mask(1, query.shape[2], **sizes)
        if self.name == "rrattn":
            core = self.core(layer, num_layers, query.shape[2])
            core(query, key, key, causal=True, softmax_scale=scale)
            return core.last_selection.block_mask
        import paddle

        scores, mask = self._baseline(query[0].numpy(), key[0].numpy(), scale or query.shape[3] ** -0.5, layer)
        if scores is None:
            scores, threshold = np.where(mask, 1.0, 0.0).astype(np.float32), 1 - 2**-20
        else:
            threshold = self.knob
        return rrattn.select_blocks(paddle.to_tensor(scores[None]), threshold, **self.keep, **sizes)

    def core(self, layer, num_layers, num_heads):
        """The RRAttention of a layer with the config, as `rrattn.enable` makes it."""
        from rrattn.integrations.common import Place, make_core

        return make_core(self.config, Place(num_layers, num_heads), layer)

    def _baseline(self, query, key, scale, layer):
        """(scores, None) or (None, mask), [Hq, Mq, Mk]."""
        if self.name == "xattention":
            return baselines.antidiagonal_scores(query, key, scale, self.stride), None
        if self.name in baselines.VARIANTS:
            return baselines.sampled_scores(query, key, scale, self.stride, self.name), None
        if self.name == "pooling":
            return baselines.pooled_scores(query, key, scale), None
        if self.name == "exact":
            import paddle

            from rrattn.attention_mass import exact_block_mass

            return exact_block_mass(paddle.to_tensor(query[None]), paddle.to_tensor(key[None]), scale), None
        if self.name == "vertical-slash":
            return None, baselines.vertical_slash_mask(query, key, scale, self.knob)
        if self.name == "window":
            return None, baselines.window_mask(query, key, int(self.knob))
        return None, baselines.random_mask(query, key, self.knob, [layer, len(query), len(key)])


def settings_by_name(settings):
    """["stride=16", "dense_layers=[0,1]"] of "stride=16,dense_layers=[0,1]"."""
    return re.split(r",(?=\w+=)", settings)


def _config_of(text, settings):
    """The RRAttentionConfig of a method's settings by name.

    Raises
    ------
    ValueError
        With the method's text, for a name that is no setting or stands there twice, or a value that is not allowed.
    """
    given = {}
    for setting in settings_by_name(settings):
        name, _, value = setting.partition("=")
        if name not in SETTINGS:
            raise ValueError(f"method {text!r} sets {name!r}, but the settings are {', '.join(SETTINGS)}")
        if name in given:
            raise ValueError(f"method {text!r} sets {name} more than once")
        try:
            given[name] = json.loads(value)
        except ValueError:
            raise ValueError(f"method {text!r}: {name} is {value!r}, but must be JSON") from None
    try:
        return RRAttentionConfig(**given)
    except ValueError as error:
        raise ValueError(f"method {text!r}: {error}") from None


def _form(name):
    if name == "dense":
        return "dense"
    form = f"{name}:NUMBER" + "[:STRIDE]" * (name in WITH_STRIDE)
    return form if name != "rrattn" else f"{form}, rrattn:SETTING=VALUE,... or rrattn:FILE.json"
