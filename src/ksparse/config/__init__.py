"""What to run, as frozen data that is validated when it is made. Torch is never imported here.

options       the base of every option class: types, choices, finite numbers
activations   one option class for each kind of activation
schema        Recipe and its sections
serialize     TOML and dictionaries
evaluation    EvalConfig and StudyConfig
"""

from ksparse.config.activations import (
    ACTIVATION_CONFIGS as ACTIVATION_CONFIGS,
)
from ksparse.config.activations import (
    WITH_AUXK as WITH_AUXK,
)
from ksparse.config.activations import (
    ActivationConfig as ActivationConfig,
)
from ksparse.config.activations import (
    BatchTopKConfig as BatchTopKConfig,
)
from ksparse.config.activations import (
    GatedConfig as GatedConfig,
)
from ksparse.config.activations import (
    JumpReLUConfig as JumpReLUConfig,
)
from ksparse.config.activations import (
    ProLUConfig as ProLUConfig,
)
from ksparse.config.activations import (
    ReLUConfig as ReLUConfig,
)
from ksparse.config.activations import (
    TopKConfig as TopKConfig,
)
from ksparse.config.activations import (
    activation_kind as activation_kind,
)
from ksparse.config.options import (
    LARGEST as LARGEST,
)
from ksparse.config.options import (
    Config as Config,
)
from ksparse.config.options import (
    check_fields as check_fields,
)
from ksparse.config.options import (
    flat as flat,
)
from ksparse.config.options import (
    preview as preview,
)
from ksparse.config.schema import (
    ActsConfig as ActsConfig,
)
from ksparse.config.schema import (
    CurveConfig as CurveConfig,
)
from ksparse.config.schema import (
    MeshConfig as MeshConfig,
)
from ksparse.config.schema import (
    OptimConfig as OptimConfig,
)
from ksparse.config.schema import (
    Recipe as Recipe,
)
from ksparse.config.schema import (
    RunConfig as RunConfig,
)
from ksparse.config.schema import (
    SAEConfig as SAEConfig,
)
from ksparse.config.schema import (
    auxk_tokens as auxk_tokens,
)
from ksparse.config.schema import (
    check as check,
)
from ksparse.config.schema import (
    check_schedule as check_schedule,
)
from ksparse.config.schema import (
    k_aux as k_aux,
)
from ksparse.config.serialize import (
    LARGEST_TOML as LARGEST_TOML,
)
from ksparse.config.serialize import (
    MOST_DOTS as MOST_DOTS,
)
from ksparse.config.serialize import (
    differences as differences,
)
from ksparse.config.serialize import (
    from_dict as from_dict,
)
from ksparse.config.serialize import (
    load_recipe as load_recipe,
)
from ksparse.config.serialize import (
    read_toml as read_toml,
)
from ksparse.config.serialize import (
    to_dict as to_dict,
)
from ksparse.config.serialize import (
    to_toml as to_toml,
)
