"""Makes the attention backend of `rrattn.integrations.fastdeploy` known to FastDeploy.

An entry point of the group "fastdeploy.model_register_plugins" calls :func:`register` where FD_PLUGINS names rrattn:

    FD_PLUGINS=rrattn FD_ATTENTION_BACKEND=RR_ATTN python -m fastdeploy.entrypoints.openai.api_server ...
"""

from __future__ import annotations

from typing import Any

NAME = "RR_ATTN"
BACKEND = "rrattn.integrations.fastdeploy.RRAttentionBackend"


def register() -> None:
    """Adds RR_ATTN to the engine's backends; once only, whatever how often it is called.

    The engine knows its backends by an enumeration, which is closed, and its platform tells the class of each. So the
    enumeration gets a member, and the platform's answer for that one is this package's class. The module of that class
    is imported when the engine makes a backend: plug-ins run while the engine's own modules are being imported.
    """
    from fastdeploy.platforms import _Backend, current_platform

    if NAME in _Backend.__members__:
        return
    member = _add_member(_Backend, NAME)
    platform = type(current_platform)
    others = platform.get_attention_backend_cls

    def get_attention_backend_cls(cls: type, selected_backend: Any) -> Any:
        return BACKEND if selected_backend is member else others(selected_backend)

    platform.get_attention_backend_cls = classmethod(get_attention_backend_cls)


def _add_member(enumeration: Any, name: str) -> Any:
    """A new member of an enumeration of integers, found by name, by value and as an attribute."""
    member = object.__new__(enumeration)
    member._name_ = name
    member._value_ = 1 + max(other.value for other in enumeration)
    member._sort_order_ = len(enumeration)
    member.__objclass__ = enumeration
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[member.value] = member
    type.__setattr__(enumeration, name, member)
    return member
