"""Names that Python and torch give a meaning of their own: which of them lead to state of a step, and which do not."""

from __future__ import annotations

LAYER_MEMBERS = ("_parameters", "_buffers", "_modules")
"""Attributes of an ``nn.Module`` whose entries it answers as attributes of its own."""
OF_MODULES = frozenset(
    (
        *("__builtins__", "__dict__", "__spec__", "__loader__", "__name__"),
        *("__package__", "__path__", "__file__", "__doc__", "__class__"),
    )
)
"""What every Python module has, which is named where the same is asked of something else."""
OF_THE_INTERPRETER = frozenset(("modules", "path_importer_cache", "meta_path", "path_hooks", "stdout", "stderr", "stdin"))
"""Names of modules under which the interpreter itself fills something, or where output goes."""
OF_FUNCTIONS = frozenset(("__doc__", "__name__", "__qualname__", "__annotations__", "__module__"))
"""What Python keeps of a function outside of its dictionary."""
OF_CLASSES = frozenset(("__dict__", "__weakref__", "__annotations__", "__slotnames__"))
"""Names in classes under which nothing lies that a step reads or changes; the last is a note of ``copyreg`` for itself."""
TYPE_PARAMETERS = frozenset(("__orig_bases__", "__parameters__"))
"""Names in classes under which lies only what types are written with."""
DESCRIPTIONS = frozenset(("__doc__", "__module__", "__abstractmethods__", "__slots__"))
"""Names in classes that describe them, and that Python looks up for itself only where a class is made."""
CALLED_BY_TORCH = frozenset(("forward", "setup_context"))
"""What torch looks up by name in an ``autograd.Function``."""
DECIDE_LOGGING = frozenset(("level", "disabled", "parent", "propagate", "manager"))
"""Attributes of a logger on which it depends whether anything is written."""
