from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EnrollRequest(_message.Message):
    __slots__ = ("token", "device_name", "agent_version", "signing_request")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    SIGNING_REQUEST_FIELD_NUMBER: _ClassVar[int]
    token: str
    device_name: str
    agent_version: str
    signing_request: bytes
    def __init__(self, token: _Optional[str] = ..., device_name: _Optional[str] = ..., agent_version: _Optional[str] = ..., signing_request: _Optional[bytes] = ...) -> None: ...

class EnrollResponse(_message.Message):
    __slots__ = ("device_id", "credential", "expires_in_s", "certificate", "trust_bundle", "fleet_port", "pending")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    CREDENTIAL_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    TRUST_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    FLEET_PORT_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    credential: str
    expires_in_s: float
    certificate: bytes
    trust_bundle: bytes
    fleet_port: int
    pending: bool
    def __init__(self, device_id: _Optional[str] = ..., credential: _Optional[str] = ..., expires_in_s: _Optional[float] = ..., certificate: _Optional[bytes] = ..., trust_bundle: _Optional[bytes] = ..., fleet_port: _Optional[int] = ..., pending: bool = ...) -> None: ...

class ReenrollRequest(_message.Message):
    __slots__ = ("certificate", "signing_request", "signature")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SIGNING_REQUEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    signing_request: bytes
    signature: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., signing_request: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class ReenrollResponse(_message.Message):
    __slots__ = ("certificate", "expires_in_s", "trust_bundle")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    TRUST_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    expires_in_s: float
    trust_bundle: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., expires_in_s: _Optional[float] = ..., trust_bundle: _Optional[bytes] = ...) -> None: ...

class TrustRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TrustResponse(_message.Message):
    __slots__ = ("trust_bundle",)
    TRUST_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    trust_bundle: bytes
    def __init__(self, trust_bundle: _Optional[bytes] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("signing_request",)
    SIGNING_REQUEST_FIELD_NUMBER: _ClassVar[int]
    signing_request: bytes
    def __init__(self, signing_request: _Optional[bytes] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("credential", "expires_in_s", "certificate", "trust_bundle")
    CREDENTIAL_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    TRUST_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    credential: str
    expires_in_s: float
    certificate: bytes
    trust_bundle: bytes
    def __init__(self, credential: _Optional[str] = ..., expires_in_s: _Optional[float] = ..., certificate: _Optional[bytes] = ..., trust_bundle: _Optional[bytes] = ...) -> None: ...

class GpuProfile(_message.Message):
    __slots__ = ("name", "memory_total_bytes", "memory_free_bytes", "compute_capability", "unified_memory")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_CAPABILITY_FIELD_NUMBER: _ClassVar[int]
    UNIFIED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    name: str
    memory_total_bytes: int
    memory_free_bytes: int
    compute_capability: str
    unified_memory: bool
    def __init__(self, name: _Optional[str] = ..., memory_total_bytes: _Optional[int] = ..., memory_free_bytes: _Optional[int] = ..., compute_capability: _Optional[str] = ..., unified_memory: bool = ...) -> None: ...

class ComputePoint(_message.Message):
    __slots__ = ("sequence_tokens", "micro_batch", "step_s", "forward_s", "peak_bytes")
    SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_S_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    sequence_tokens: int
    micro_batch: int
    step_s: float
    forward_s: float
    peak_bytes: int
    def __init__(self, sequence_tokens: _Optional[int] = ..., micro_batch: _Optional[int] = ..., step_s: _Optional[float] = ..., forward_s: _Optional[float] = ..., peak_bytes: _Optional[int] = ...) -> None: ...

class ComputeProfile(_message.Message):
    __slots__ = ("base_digest", "precision", "tokens_per_s", "forward_tokens_per_s", "baseline_bytes", "peak_bytes", "rank", "sequence_tokens", "micro_batch", "loaded_bytes", "small")
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    FORWARD_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    BASELINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SMALL_FIELD_NUMBER: _ClassVar[int]
    base_digest: str
    precision: str
    tokens_per_s: float
    forward_tokens_per_s: float
    baseline_bytes: int
    peak_bytes: int
    rank: int
    sequence_tokens: int
    micro_batch: int
    loaded_bytes: int
    small: ComputePoint
    def __init__(self, base_digest: _Optional[str] = ..., precision: _Optional[str] = ..., tokens_per_s: _Optional[float] = ..., forward_tokens_per_s: _Optional[float] = ..., baseline_bytes: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., rank: _Optional[int] = ..., sequence_tokens: _Optional[int] = ..., micro_batch: _Optional[int] = ..., loaded_bytes: _Optional[int] = ..., small: _Optional[_Union[ComputePoint, _Mapping]] = ...) -> None: ...

class PowerProfile(_message.Message):
    __slots__ = ("mode", "on_battery", "battery_percent", "temperature_c")
    MODE_FIELD_NUMBER: _ClassVar[int]
    ON_BATTERY_FIELD_NUMBER: _ClassVar[int]
    BATTERY_PERCENT_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_C_FIELD_NUMBER: _ClassVar[int]
    mode: str
    on_battery: bool
    battery_percent: float
    temperature_c: float
    def __init__(self, mode: _Optional[str] = ..., on_battery: bool = ..., battery_percent: _Optional[float] = ..., temperature_c: _Optional[float] = ...) -> None: ...

class LinkProfile(_message.Message):
    __slots__ = ("up_bps", "down_bps", "rtt_s", "metered", "variation", "budget_bytes")
    UP_BPS_FIELD_NUMBER: _ClassVar[int]
    DOWN_BPS_FIELD_NUMBER: _ClassVar[int]
    RTT_S_FIELD_NUMBER: _ClassVar[int]
    METERED_FIELD_NUMBER: _ClassVar[int]
    VARIATION_FIELD_NUMBER: _ClassVar[int]
    BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    up_bps: float
    down_bps: float
    rtt_s: float
    metered: bool
    variation: float
    budget_bytes: int
    def __init__(self, up_bps: _Optional[float] = ..., down_bps: _Optional[float] = ..., rtt_s: _Optional[float] = ..., metered: bool = ..., variation: _Optional[float] = ..., budget_bytes: _Optional[int] = ...) -> None: ...

class DeviceProfile(_message.Message):
    __slots__ = ("board", "cpu", "cores", "memory_total_bytes", "memory_available_bytes", "memory_cap_bytes", "disk_free_bytes", "agent_version", "gpu", "compute", "link", "known_board", "swap_bytes", "power")
    BOARD_FIELD_NUMBER: _ClassVar[int]
    CPU_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_CAP_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    KNOWN_BOARD_FIELD_NUMBER: _ClassVar[int]
    SWAP_BYTES_FIELD_NUMBER: _ClassVar[int]
    POWER_FIELD_NUMBER: _ClassVar[int]
    board: str
    cpu: str
    cores: int
    memory_total_bytes: int
    memory_available_bytes: int
    memory_cap_bytes: int
    disk_free_bytes: int
    agent_version: str
    gpu: GpuProfile
    compute: ComputeProfile
    link: LinkProfile
    known_board: str
    swap_bytes: int
    power: PowerProfile
    def __init__(self, board: _Optional[str] = ..., cpu: _Optional[str] = ..., cores: _Optional[int] = ..., memory_total_bytes: _Optional[int] = ..., memory_available_bytes: _Optional[int] = ..., memory_cap_bytes: _Optional[int] = ..., disk_free_bytes: _Optional[int] = ..., agent_version: _Optional[str] = ..., gpu: _Optional[_Union[GpuProfile, _Mapping]] = ..., compute: _Optional[_Union[ComputeProfile, _Mapping]] = ..., link: _Optional[_Union[LinkProfile, _Mapping]] = ..., known_board: _Optional[str] = ..., swap_bytes: _Optional[int] = ..., power: _Optional[_Union[PowerProfile, _Mapping]] = ...) -> None: ...

class ModuleShape(_message.Message):
    __slots__ = ("name", "out_features", "in_features")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    name: str
    out_features: int
    in_features: int
    def __init__(self, name: _Optional[str] = ..., out_features: _Optional[int] = ..., in_features: _Optional[int] = ...) -> None: ...

class Classification(_message.Message):
    __slots__ = ("labels", "head")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedScalarFieldContainer[str]
    head: str
    def __init__(self, labels: _Optional[_Iterable[str]] = ..., head: _Optional[str] = ...) -> None: ...

class AdapterSpec(_message.Message):
    __slots__ = ("run_id", "base", "base_revision", "base_digest", "rank", "alpha", "use_rslora", "seed", "modules", "dense", "classification")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    BASE_REVISION_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    USE_RSLORA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    CLASSIFICATION_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    base: str
    base_revision: str
    base_digest: str
    rank: int
    alpha: float
    use_rslora: bool
    seed: int
    modules: _containers.RepeatedCompositeFieldContainer[ModuleShape]
    dense: _containers.RepeatedCompositeFieldContainer[ModuleShape]
    classification: Classification
    def __init__(self, run_id: _Optional[str] = ..., base: _Optional[str] = ..., base_revision: _Optional[str] = ..., base_digest: _Optional[str] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., use_rslora: bool = ..., seed: _Optional[int] = ..., modules: _Optional[_Iterable[_Union[ModuleShape, _Mapping]]] = ..., dense: _Optional[_Iterable[_Union[ModuleShape, _Mapping]]] = ..., classification: _Optional[_Union[Classification, _Mapping]] = ...) -> None: ...

class Payload(_message.Message):
    __slots__ = ("rank", "encoding", "parts", "density", "group", "compressed")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    COMPRESSED_FIELD_NUMBER: _ClassVar[int]
    rank: int
    encoding: str
    parts: _containers.RepeatedScalarFieldContainer[str]
    density: float
    group: int
    compressed: bool
    def __init__(self, rank: _Optional[int] = ..., encoding: _Optional[str] = ..., parts: _Optional[_Iterable[str]] = ..., density: _Optional[float] = ..., group: _Optional[int] = ..., compressed: bool = ...) -> None: ...

class UpdateBudget(_message.Message):
    __slots__ = ("size_bytes", "encodings", "sparse", "groups")
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    size_bytes: int
    encodings: _containers.RepeatedScalarFieldContainer[str]
    sparse: bool
    groups: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, size_bytes: _Optional[int] = ..., encodings: _Optional[_Iterable[str]] = ..., sparse: bool = ..., groups: _Optional[_Iterable[int]] = ...) -> None: ...

class ErrorCurve(_message.Message):
    __slots__ = ("encoding", "group", "errors")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    encoding: str
    group: int
    errors: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, encoding: _Optional[str] = ..., group: _Optional[int] = ..., errors: _Optional[_Iterable[float]] = ...) -> None: ...

class BlobRef(_message.Message):
    __slots__ = ("digest", "size_bytes", "payload")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size_bytes: int
    payload: Payload
    def __init__(self, digest: _Optional[str] = ..., size_bytes: _Optional[int] = ..., payload: _Optional[_Union[Payload, _Mapping]] = ...) -> None: ...

class MirrorFile(_message.Message):
    __slots__ = ("blob", "rows", "adds")
    BLOB_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ADDS_FIELD_NUMBER: _ClassVar[int]
    blob: BlobRef
    rows: str
    adds: bool
    def __init__(self, blob: _Optional[_Union[BlobRef, _Mapping]] = ..., rows: _Optional[str] = ..., adds: bool = ...) -> None: ...

class MirrorStep(_message.Message):
    __slots__ = ("files", "result", "up_factor", "base")
    FILES_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    UP_FACTOR_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[MirrorFile]
    result: BlobRef
    up_factor: float
    base: BlobRef
    def __init__(self, files: _Optional[_Iterable[_Union[MirrorFile, _Mapping]]] = ..., result: _Optional[_Union[BlobRef, _Mapping]] = ..., up_factor: _Optional[float] = ..., base: _Optional[_Union[BlobRef, _Mapping]] = ...) -> None: ...

class Objective(_message.Message):
    __slots__ = ("ceiling", "margin")
    CEILING_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    ceiling: float
    margin: float
    def __init__(self, ceiling: _Optional[float] = ..., margin: _Optional[float] = ...) -> None: ...

class Pruning(_message.Message):
    __slots__ = ("keep", "penalty")
    KEEP_FIELD_NUMBER: _ClassVar[int]
    PENALTY_FIELD_NUMBER: _ClassVar[int]
    keep: float
    penalty: float
    def __init__(self, keep: _Optional[float] = ..., penalty: _Optional[float] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("assignment_id", "run_id", "round", "device_id", "method", "rank", "sketch_offset", "precision", "sequence_tokens", "micro_batch", "accumulation", "checkpointing", "local_steps", "learning_rate", "optimizer", "update", "evaluation_sequences", "held_out_share", "seed", "slice", "global_adapter", "deadline_s", "reason", "rows", "alpha", "trained", "personal", "keeps_state", "error_feedback", "fresh", "evaluates_global", "side", "global_side", "objective", "pruning", "keeps_basis", "fill_in_middle", "completions", "local_only", "budget", "mirror")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    SKETCH_OFFSET_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATION_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_SHARE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_ADAPTER_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_FIELD_NUMBER: _ClassVar[int]
    KEEPS_STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FEEDBACK_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    EVALUATES_GLOBAL_FIELD_NUMBER: _ClassVar[int]
    SIDE_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_SIDE_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    PRUNING_FIELD_NUMBER: _ClassVar[int]
    KEEPS_BASIS_FIELD_NUMBER: _ClassVar[int]
    FILL_IN_MIDDLE_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_ONLY_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    MIRROR_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    run_id: str
    round: int
    device_id: str
    method: str
    rank: int
    sketch_offset: int
    precision: str
    sequence_tokens: int
    micro_batch: int
    accumulation: int
    checkpointing: bool
    local_steps: int
    learning_rate: float
    optimizer: str
    update: Payload
    evaluation_sequences: int
    held_out_share: float
    seed: int
    slice: _containers.RepeatedCompositeFieldContainer[BlobRef]
    global_adapter: _containers.RepeatedCompositeFieldContainer[BlobRef]
    deadline_s: float
    reason: str
    rows: str
    alpha: float
    trained: _containers.RepeatedScalarFieldContainer[str]
    personal: _containers.RepeatedScalarFieldContainer[str]
    keeps_state: bool
    error_feedback: bool
    fresh: bool
    evaluates_global: bool
    side: BlobRef
    global_side: BlobRef
    objective: Objective
    pruning: Pruning
    keeps_basis: bool
    fill_in_middle: float
    completions: int
    local_only: bool
    budget: UpdateBudget
    mirror: MirrorStep
    def __init__(self, assignment_id: _Optional[str] = ..., run_id: _Optional[str] = ..., round: _Optional[int] = ..., device_id: _Optional[str] = ..., method: _Optional[str] = ..., rank: _Optional[int] = ..., sketch_offset: _Optional[int] = ..., precision: _Optional[str] = ..., sequence_tokens: _Optional[int] = ..., micro_batch: _Optional[int] = ..., accumulation: _Optional[int] = ..., checkpointing: bool = ..., local_steps: _Optional[int] = ..., learning_rate: _Optional[float] = ..., optimizer: _Optional[str] = ..., update: _Optional[_Union[Payload, _Mapping]] = ..., evaluation_sequences: _Optional[int] = ..., held_out_share: _Optional[float] = ..., seed: _Optional[int] = ..., slice: _Optional[_Iterable[_Union[BlobRef, _Mapping]]] = ..., global_adapter: _Optional[_Iterable[_Union[BlobRef, _Mapping]]] = ..., deadline_s: _Optional[float] = ..., reason: _Optional[str] = ..., rows: _Optional[str] = ..., alpha: _Optional[float] = ..., trained: _Optional[_Iterable[str]] = ..., personal: _Optional[_Iterable[str]] = ..., keeps_state: bool = ..., error_feedback: bool = ..., fresh: bool = ..., evaluates_global: bool = ..., side: _Optional[_Union[BlobRef, _Mapping]] = ..., global_side: _Optional[_Union[BlobRef, _Mapping]] = ..., objective: _Optional[_Union[Objective, _Mapping]] = ..., pruning: _Optional[_Union[Pruning, _Mapping]] = ..., keeps_basis: bool = ..., fill_in_middle: _Optional[float] = ..., completions: _Optional[int] = ..., local_only: bool = ..., budget: _Optional[_Union[UpdateBudget, _Mapping]] = ..., mirror: _Optional[_Union[MirrorStep, _Mapping]] = ...) -> None: ...

class NextTaskRequest(_message.Message):
    __slots__ = ("profile", "wait_s", "working_on", "progress", "trust_digest", "mirror")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    WORKING_ON_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    TRUST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    MIRROR_FIELD_NUMBER: _ClassVar[int]
    profile: DeviceProfile
    wait_s: float
    working_on: str
    progress: Progress
    trust_digest: bytes
    mirror: str
    def __init__(self, profile: _Optional[_Union[DeviceProfile, _Mapping]] = ..., wait_s: _Optional[float] = ..., working_on: _Optional[str] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., trust_digest: _Optional[bytes] = ..., mirror: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("step", "steps", "tokens_per_s", "memory_bytes", "temperature_c", "joules", "paused")
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_C_FIELD_NUMBER: _ClassVar[int]
    JOULES_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    step: int
    steps: int
    tokens_per_s: float
    memory_bytes: int
    temperature_c: float
    joules: float
    paused: str
    def __init__(self, step: _Optional[int] = ..., steps: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., temperature_c: _Optional[float] = ..., joules: _Optional[float] = ..., paused: _Optional[str] = ...) -> None: ...

class NextTaskResponse(_message.Message):
    __slots__ = ("kind", "poll_again_s", "spec", "assignment", "remaining_s", "profile_request", "message", "trust_bundle")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[NextTaskResponse.Kind]
        KIND_WAIT: _ClassVar[NextTaskResponse.Kind]
        KIND_PROFILE: _ClassVar[NextTaskResponse.Kind]
        KIND_ASSIGNMENT: _ClassVar[NextTaskResponse.Kind]
        KIND_RUN_FINISHED: _ClassVar[NextTaskResponse.Kind]
    KIND_UNSPECIFIED: NextTaskResponse.Kind
    KIND_WAIT: NextTaskResponse.Kind
    KIND_PROFILE: NextTaskResponse.Kind
    KIND_ASSIGNMENT: NextTaskResponse.Kind
    KIND_RUN_FINISHED: NextTaskResponse.Kind
    KIND_FIELD_NUMBER: _ClassVar[int]
    POLL_AGAIN_S_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    REMAINING_S_FIELD_NUMBER: _ClassVar[int]
    PROFILE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    TRUST_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    kind: NextTaskResponse.Kind
    poll_again_s: float
    spec: AdapterSpec
    assignment: Assignment
    remaining_s: float
    profile_request: ProfileRequest
    message: str
    trust_bundle: bytes
    def __init__(self, kind: _Optional[_Union[NextTaskResponse.Kind, str]] = ..., poll_again_s: _Optional[float] = ..., spec: _Optional[_Union[AdapterSpec, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., remaining_s: _Optional[float] = ..., profile_request: _Optional[_Union[ProfileRequest, _Mapping]] = ..., message: _Optional[str] = ..., trust_bundle: _Optional[bytes] = ...) -> None: ...

class ProfileRequest(_message.Message):
    __slots__ = ("precision", "sequence_tokens", "micro_batch", "rank")
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    precision: str
    sequence_tokens: int
    micro_batch: int
    rank: int
    def __init__(self, precision: _Optional[str] = ..., sequence_tokens: _Optional[int] = ..., micro_batch: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("subject", "stage", "loss", "token_accuracy", "tokens", "completions", "exact_match", "edit_similarity", "problems", "samples", "pass_at_1", "pass_at_k", "example_millinats", "example_tokens", "macro_f1")
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    EXACT_MATCH_FIELD_NUMBER: _ClassVar[int]
    EDIT_SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    PASS_AT_1_FIELD_NUMBER: _ClassVar[int]
    PASS_AT_K_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_MILLINATS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MACRO_F1_FIELD_NUMBER: _ClassVar[int]
    subject: str
    stage: str
    loss: float
    token_accuracy: float
    tokens: int
    completions: int
    exact_match: float
    edit_similarity: float
    problems: int
    samples: int
    pass_at_1: float
    pass_at_k: float
    example_millinats: _containers.RepeatedScalarFieldContainer[int]
    example_tokens: _containers.RepeatedScalarFieldContainer[int]
    macro_f1: float
    def __init__(self, subject: _Optional[str] = ..., stage: _Optional[str] = ..., loss: _Optional[float] = ..., token_accuracy: _Optional[float] = ..., tokens: _Optional[int] = ..., completions: _Optional[int] = ..., exact_match: _Optional[float] = ..., edit_similarity: _Optional[float] = ..., problems: _Optional[int] = ..., samples: _Optional[int] = ..., pass_at_1: _Optional[float] = ..., pass_at_k: _Optional[float] = ..., example_millinats: _Optional[_Iterable[int]] = ..., example_tokens: _Optional[_Iterable[int]] = ..., macro_f1: _Optional[float] = ...) -> None: ...

class LocalReport(_message.Message):
    __slots__ = ("assignment_id", "outcome", "message", "evaluations", "train_examples", "train_tokens", "train_loss", "trained_parameters", "peak_bytes", "fetch_s", "train_s", "evaluate_s", "push_s", "fetched_bytes", "pushed_bytes", "resumes", "main_language", "kept_rank", "step_s", "load_s", "paused_s", "resumed_step", "temperature_c", "joules", "wait_s", "pack_s", "resent_bytes", "sent", "update_error", "error_curves")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TRAIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    TRAINED_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    PEAK_BYTES_FIELD_NUMBER: _ClassVar[int]
    FETCH_S_FIELD_NUMBER: _ClassVar[int]
    TRAIN_S_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_S_FIELD_NUMBER: _ClassVar[int]
    PUSH_S_FIELD_NUMBER: _ClassVar[int]
    FETCHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PUSHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESUMES_FIELD_NUMBER: _ClassVar[int]
    MAIN_LANGUAGE_FIELD_NUMBER: _ClassVar[int]
    KEPT_RANK_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    PAUSED_S_FIELD_NUMBER: _ClassVar[int]
    RESUMED_STEP_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_C_FIELD_NUMBER: _ClassVar[int]
    JOULES_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    PACK_S_FIELD_NUMBER: _ClassVar[int]
    RESENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_ERROR_FIELD_NUMBER: _ClassVar[int]
    ERROR_CURVES_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    outcome: str
    message: str
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    train_examples: int
    train_tokens: int
    train_loss: float
    trained_parameters: int
    peak_bytes: int
    fetch_s: float
    train_s: float
    evaluate_s: float
    push_s: float
    fetched_bytes: int
    pushed_bytes: int
    resumes: int
    main_language: str
    kept_rank: int
    step_s: float
    load_s: float
    paused_s: float
    resumed_step: int
    temperature_c: float
    joules: float
    wait_s: float
    pack_s: float
    resent_bytes: int
    sent: Payload
    update_error: float
    error_curves: _containers.RepeatedCompositeFieldContainer[ErrorCurve]
    def __init__(self, assignment_id: _Optional[str] = ..., outcome: _Optional[str] = ..., message: _Optional[str] = ..., evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ..., train_examples: _Optional[int] = ..., train_tokens: _Optional[int] = ..., train_loss: _Optional[float] = ..., trained_parameters: _Optional[int] = ..., peak_bytes: _Optional[int] = ..., fetch_s: _Optional[float] = ..., train_s: _Optional[float] = ..., evaluate_s: _Optional[float] = ..., push_s: _Optional[float] = ..., fetched_bytes: _Optional[int] = ..., pushed_bytes: _Optional[int] = ..., resumes: _Optional[int] = ..., main_language: _Optional[str] = ..., kept_rank: _Optional[int] = ..., step_s: _Optional[float] = ..., load_s: _Optional[float] = ..., paused_s: _Optional[float] = ..., resumed_step: _Optional[int] = ..., temperature_c: _Optional[float] = ..., joules: _Optional[float] = ..., wait_s: _Optional[float] = ..., pack_s: _Optional[float] = ..., resent_bytes: _Optional[int] = ..., sent: _Optional[_Union[Payload, _Mapping]] = ..., update_error: _Optional[float] = ..., error_curves: _Optional[_Iterable[_Union[ErrorCurve, _Mapping]]] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("report",)
    REPORT_FIELD_NUMBER: _ClassVar[int]
    report: LocalReport
    def __init__(self, report: _Optional[_Union[LocalReport, _Mapping]] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProbeRequest(_message.Message):
    __slots__ = ("payload", "reply_bytes", "last")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    reply_bytes: int
    last: bool
    def __init__(self, payload: _Optional[bytes] = ..., reply_bytes: _Optional[int] = ..., last: bool = ...) -> None: ...

class ProbeResponse(_message.Message):
    __slots__ = ("payload", "timed_bytes", "timed_s")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    TIMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TIMED_S_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    timed_bytes: int
    timed_s: float
    def __init__(self, payload: _Optional[bytes] = ..., timed_bytes: _Optional[int] = ..., timed_s: _Optional[float] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("digest", "offset", "chunk_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    chunk_bytes: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ..., chunk_bytes: _Optional[int] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("offset", "crc32", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    crc32: int
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., crc32: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("offset", "crc32", "acknowledge", "update", "data")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offset: int
    crc32: int
    acknowledge: bool
    update: PushedUpdate
    data: bytes
    def __init__(self, offset: _Optional[int] = ..., crc32: _Optional[int] = ..., acknowledge: bool = ..., update: _Optional[_Union[PushedUpdate, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PushedUpdate(_message.Message):
    __slots__ = ("assignment_id", "digest", "size_bytes")
    ASSIGNMENT_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    assignment_id: str
    digest: str
    size_bytes: int
    def __init__(self, assignment_id: _Optional[str] = ..., digest: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class PushResponse(_message.Message):
    __slots__ = ("durable_bytes", "chunk_bytes", "receipt", "outcome")
    DURABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    durable_bytes: int
    chunk_bytes: int
    receipt: str
    outcome: str
    def __init__(self, durable_bytes: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., receipt: _Optional[str] = ..., outcome: _Optional[str] = ...) -> None: ...
