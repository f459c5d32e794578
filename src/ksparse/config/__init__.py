"""What to run, as frozen data that is validated when it is made. Nothing here imports torch.

options       the base of every option class: types, choices, ranges
activations   one option class for each kind of activation
schema        Recipe and its sections
serialize     recipes as TOML and as dictionaries
keywords      recipes from a file, a dictionary or flat keywords
evaluation    EvalConfig and StudyConfig
planted       activations made of known features
"""

from ksparse.config.activations import (
    ACTIVATION_CONFIGS,
    ActivationConfig,
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ProLUConfig,
    ReLUConfig,
    TopKConfig,
    activation_kind,
)
from ksparse.config.keywords import recipe_of
from ksparse.config.options import LARGEST, Config, check_fields, flat, plain, preview
from ksparse.config.planted import Planted
from ksparse.config.schema import (
    CONTROLS,
    LATER_ACTS,
    SEVERAL_SITES,
    ActsConfig,
    CurveConfig,
    MeshConfig,
    OptimConfig,
    Recipe,
    RunConfig,
    SAEConfig,
    auxk_tokens,
    check_schedule,
    k_aux,
)
from ksparse.config.serialize import (
    LARGEST_TOML,
    MOST_DOTS,
    differences,
    from_dict,
    load_recipe,
    load_recipe_of_run,
    read_toml,
    to_dict,
    to_toml,
)

__all__ = [
    "ACTIVATION_CONFIGS",
    "CONTROLS",
    "LARGEST",
    "LARGEST_TOML",
    "LATER_ACTS",
    "MOST_DOTS",
    "SEVERAL_SITES",
    "ActivationConfig",
    "ActsConfig",
    "BatchTopKConfig",
    "Config",
    "CurveConfig",
    "GatedConfig",
    "JumpReLUConfig",
    "MeshConfig",
    "OptimConfig",
    "Planted",
    "ProLUConfig",
    "ReLUConfig",
    "Recipe",
    "RunConfig",
    "SAEConfig",
    "TopKConfig",
    "activation_kind",
    "auxk_tokens",
    "check_fields",
    "check_schedule",
    "differences",
    "flat",
    "from_dict",
    "k_aux",
    "load_recipe",
    "load_recipe_of_run",
    "plain",
    "preview",
    "read_toml",
    "recipe_of",
    "to_dict",
    "to_toml",
]
