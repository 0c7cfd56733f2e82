from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Empty(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("per_s",)
    PER_S_FIELD_NUMBER: _ClassVar[int]
    per_s: float
    def __init__(self, per_s: _Optional[float] = ...) -> None: ...

class LogRequest(_message.Message):
    __slots__ = ("lines", "follow")
    LINES_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    lines: int
    follow: bool
    def __init__(self, lines: _Optional[int] = ..., follow: _Optional[bool] = ...) -> None: ...

class LogLine(_message.Message):
    __slots__ = ("time", "text")
    TIME_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    time: float
    text: str
    def __init__(self, time: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("up_mbps", "down_mbps", "compute_percent", "threads", "memory_gb", "hours", "daily_gb", "monthly_gb", "on_battery", "when_idle")
    UP_MBPS_FIELD_NUMBER: _ClassVar[int]
    DOWN_MBPS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_PERCENT_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_GB_FIELD_NUMBER: _ClassVar[int]
    HOURS_FIELD_NUMBER: _ClassVar[int]
    DAILY_GB_FIELD_NUMBER: _ClassVar[int]
    MONTHLY_GB_FIELD_NUMBER: _ClassVar[int]
    ON_BATTERY_FIELD_NUMBER: _ClassVar[int]
    WHEN_IDLE_FIELD_NUMBER: _ClassVar[int]
    up_mbps: float
    down_mbps: float
    compute_percent: float
    threads: int
    memory_gb: float
    hours: str
    daily_gb: float
    monthly_gb: float
    on_battery: bool
    when_idle: bool
    def __init__(self, up_mbps: _Optional[float] = ..., down_mbps: _Optional[float] = ..., compute_percent: _Optional[float] = ..., threads: _Optional[int] = ..., memory_gb: _Optional[float] = ..., hours: _Optional[str] = ..., daily_gb: _Optional[float] = ..., monthly_gb: _Optional[float] = ..., on_battery: _Optional[bool] = ..., when_idle: _Optional[bool] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("stage", "done", "total", "unit", "eta_s", "rate")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    ETA_S_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    stage: str
    done: float
    total: float
    unit: str
    eta_s: float
    rate: float
    def __init__(self, stage: _Optional[str] = ..., done: _Optional[float] = ..., total: _Optional[float] = ..., unit: _Optional[str] = ..., eta_s: _Optional[float] = ..., rate: _Optional[float] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("run_id", "name", "peer_id", "pid", "folder", "device", "state", "held", "pausing", "finishing", "round", "rounds_contributed", "step", "inner_steps", "tokens", "tokens_per_s", "loss", "round_ends_in_s", "compute_share", "workers", "reach", "bytes_up", "bytes_down", "bytes_today", "bytes_this_month", "memory_gb", "started", "num_params", "invite", "limits", "progress", "last_share_percent")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    PAUSING_FIELD_NUMBER: _ClassVar[int]
    FINISHING_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_CONTRIBUTED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    INNER_STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    ROUND_ENDS_IN_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SHARE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REACH_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    BYTES_TODAY_FIELD_NUMBER: _ClassVar[int]
    BYTES_THIS_MONTH_FIELD_NUMBER: _ClassVar[int]
    MEMORY_GB_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMS_FIELD_NUMBER: _ClassVar[int]
    INVITE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    LAST_SHARE_PERCENT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    name: str
    peer_id: str
    pid: int
    folder: str
    device: str
    state: str
    held: str
    pausing: bool
    finishing: bool
    round: int
    rounds_contributed: int
    step: int
    inner_steps: int
    tokens: int
    tokens_per_s: float
    loss: float
    round_ends_in_s: float
    compute_share: float
    workers: int
    reach: str
    bytes_up: int
    bytes_down: int
    bytes_today: int
    bytes_this_month: int
    memory_gb: float
    started: float
    num_params: int
    invite: str
    limits: Limits
    progress: Progress
    last_share_percent: float
    def __init__(self, run_id: _Optional[str] = ..., name: _Optional[str] = ..., peer_id: _Optional[str] = ..., pid: _Optional[int] = ..., folder: _Optional[str] = ..., device: _Optional[str] = ..., state: _Optional[str] = ..., held: _Optional[str] = ..., pausing: _Optional[bool] = ..., finishing: _Optional[bool] = ..., round: _Optional[int] = ..., rounds_contributed: _Optional[int] = ..., step: _Optional[int] = ..., inner_steps: _Optional[int] = ..., tokens: _Optional[int] = ..., tokens_per_s: _Optional[float] = ..., loss: _Optional[float] = ..., round_ends_in_s: _Optional[float] = ..., compute_share: _Optional[float] = ..., workers: _Optional[int] = ..., reach: _Optional[str] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., bytes_today: _Optional[int] = ..., bytes_this_month: _Optional[int] = ..., memory_gb: _Optional[float] = ..., started: _Optional[float] = ..., num_params: _Optional[int] = ..., invite: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., last_share_percent: _Optional[float] = ...) -> None: ...
