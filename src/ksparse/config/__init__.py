"""What a run is, as frozen data. See `ksparse.config.schema`."""

from ksparse.config.schema import (
    ACTIVATION_CONFIGS as ACTIVATION_CONFIGS,
)
from ksparse.config.schema import (
    LARGEST as LARGEST,
)
from ksparse.config.schema import (
    LARGEST_TOML as LARGEST_TOML,
)
from ksparse.config.schema import (
    MOST_DOTS as MOST_DOTS,
)
from ksparse.config.schema import (
    WITH_AUXK as WITH_AUXK,
)
from ksparse.config.schema import (
    ActivationConfig as ActivationConfig,
)
from ksparse.config.schema import (
    ActsConfig as ActsConfig,
)
from ksparse.config.schema import (
    BatchTopKConfig as BatchTopKConfig,
)
from ksparse.config.schema import (
    Config as Config,
)
from ksparse.config.schema import (
    CurveConfig as CurveConfig,
)
from ksparse.config.schema import (
    GatedConfig as GatedConfig,
)
from ksparse.config.schema import (
    JumpReLUConfig as JumpReLUConfig,
)
from ksparse.config.schema import (
    MeshConfig as MeshConfig,
)
from ksparse.config.schema import (
    OptimConfig as OptimConfig,
)
from ksparse.config.schema import (
    ProLUConfig as ProLUConfig,
)
from ksparse.config.schema import (
    Recipe as Recipe,
)
from ksparse.config.schema import (
    ReLUConfig as ReLUConfig,
)
from ksparse.config.schema import (
    RunConfig as RunConfig,
)
from ksparse.config.schema import (
    SAEConfig as SAEConfig,
)
from ksparse.config.schema import (
    TopKConfig as TopKConfig,
)
from ksparse.config.schema import (
    activation_kind as activation_kind,
)
from ksparse.config.schema import (
    auxk_tokens as auxk_tokens,
)
from ksparse.config.schema import (
    check as check,
)
from ksparse.config.schema import (
    check_activation as check_activation,
)
from ksparse.config.schema import (
    check_fields as check_fields,
)
from ksparse.config.schema import (
    check_schedule as check_schedule,
)
from ksparse.config.schema import (
    differences as differences,
)
from ksparse.config.schema import (
    flat as flat,
)
from ksparse.config.schema import (
    from_dict as from_dict,
)
from ksparse.config.schema import (
    k_aux as k_aux,
)
from ksparse.config.schema import (
    load_recipe as load_recipe,
)
from ksparse.config.schema import (
    preview as preview,
)
from ksparse.config.schema import (
    read_toml as read_toml,
)
from ksparse.config.schema import (
    to_dict as to_dict,
)
from ksparse.config.schema import (
    to_toml as to_toml,
)
