"""Names of easyroutine's HookedModel that mean nothing here, each refused with what to use instead."""

from __future__ import annotations

from typing import Any, NoReturn

from neuron_lens.errors import RequestError

__all__ = ["NotOffered"]

TEXT_ONLY = "models here read text only"
INSTEAD = {
    "create_hooks": "hooks are made for each forward and end with it; pass requests to forward, or a function of your own to "
    "register_forward_hook or set_hooks",
    "set_custom_modules": "no module is replaced here: patterns and scores are always there; set extract_attn_pattern=True",
    "restore_original_modules": "no module is ever replaced here: there is nothing to restore",
    "use_language_model_only": f"{TEXT_ONLY}: leave it out",
    "use_full_model": f"{TEXT_ONLY}: leave it out",
    "get_processor": f"{TEXT_ONLY} and have no processor; use get_tokenizer()",
    "get_image_placeholder": f"{TEXT_ONLY}; positions of image tokens have the names all-image, start-image, end-image",
    "assert_module_exists": "get_module_from_string(component) raises when there is none",
    "assert_all_modules_exist": "get_module_from_string(component) raises when there is none",
}


def _refused(name: str) -> Any:
    def method(self: object, *given: Any, **options: Any) -> NoReturn:
        raise RequestError(f"{name} is not offered: {INSTEAD[name]}")

    method.__name__, method.__doc__ = name, f"Not offered: {INSTEAD[name]}. Raises RequestError."
    return method


class NotOffered:
    """The refused methods, for a class to inherit."""

    create_hooks = _refused("create_hooks")
    set_custom_modules = _refused("set_custom_modules")
    restore_original_modules = _refused("restore_original_modules")
    use_language_model_only = _refused("use_language_model_only")
    use_full_model = _refused("use_full_model")
    get_processor = _refused("get_processor")
    get_image_placeholder = _refused("get_image_placeholder")
    assert_module_exists = _refused("assert_module_exists")
    assert_all_modules_exist = _refused("assert_all_modules_exist")
