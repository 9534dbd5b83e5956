"""Invariant: an engine keeps no peer waiting, whatever it does besides steps; its calls without any engine."""

import contextlib
import queue
import sys
import types
from typing import Any

import pytest
import torch
from vllm.v1.engine import EngineCoreRequestType, core
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import AsyncModelRunnerOutput

from vllm_dwdp import config
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration import launch, remote, watchdog, worker
from vllm_dwdp.integration.engine import LOOKS, IndependentEngineCore
from vllm_dwdp.kernels.tokens import did_not_come


class Executor(UniProcExecutor):
    """In this process; `calls` are what its worker was asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def collective_rpc(self, method: str, *args: Any, non_block: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
        self.calls.append(method)
        return types.SimpleNamespace(result=lambda: self.calls.append("heard")) if non_block else [False]


class OtherExecutor:
    collective_rpc, __init__ = Executor.collective_rpc, Executor.__init__


def engine(executor: Any, **attributes: Any) -> IndependentEngineCore:
    made = object.__new__(IndependentEngineCore)
    scheduler = types.SimpleNamespace(has_requests=lambda: False)
    given = dict(engines_running=False, batch_queue=None, _meets=True, _expected=None, _said_idle=False) | attributes
    vars(made).update(model_executor=executor, scheduler=scheduler, output_queue=queue.Queue(), post_step=lambda _: None, **given)
    return made


def run(made: IndependentEngineCore, steps: list[bool]) -> None:
    """As many steps of vLLM's, each of which executes something or not."""
    left = iter(steps)
    made.step_fn = lambda: ({}, next(left))
    for executed in steps:
        assert made._process_engine_step() == executed


@pytest.mark.parametrize(("executor", "helps"), [(Executor, 4), (OtherExecutor, 2)])
def test_requests_that_no_step_can_take_keep_no_peer_waiting(executor: type, helps: int) -> None:
    """As while a grammar is compiled, or a decoder pulls KV: the rank helps meanwhile. A worker in another process is told once."""
    run(engine(asked := executor()), [True, False, False, True, False, False])
    assert asked.calls == ["dwdp_help"] * helps
    run(engine(asked := OtherExecutor(), _meets=False), [True, False])
    assert not asked.calls, "no step dispatches"


@pytest.mark.parametrize(("answer", "blocks"), [(False, False), (None, True)])
def test_an_idle_rank_does_not_block_where_peers_may_ask_for_it(monkeypatch, answer: bool | None, blocks: bool) -> None:
    """Once a call wakes it vLLM would wait for the next one, and the rank help nobody; where no step dispatches it may."""
    asked, calls = Executor(), queue.Queue()
    monkeypatch.setattr(asked, "collective_rpc", lambda *_, **__: [answer])
    monkeypatch.setattr(IndependentEngineCore, "is_running", lambda self: True)
    calls.put(None)
    made = engine(asked, input_queue=calls if not blocks else queue.Queue(), _idle_state_callbacks=[], process_input_queue_block=not blocks)
    made._help_until_work()
    assert made.process_input_queue_block == blocks


@pytest.mark.parametrize(("paths", "beats"), [(["ipc:///a"], 0), (["ipc:///a", "tcp://host:1"], 1)])
def test_an_engine_gives_front_ends_on_other_nodes_signs_of_life(monkeypatch, paths: list[str], beats: int) -> None:
    said = []
    monkeypatch.setattr(remote, "beat", lambda outputs, clients: said.append(clients))
    monkeypatch.setattr(core.EngineCoreProc, "process_output_sockets", lambda *_: None)
    engine(Executor()).process_output_sockets(paths)
    assert said == [len(paths)] * beats


def test_a_rank_is_not_idle_while_a_step_of_its_is_under_way() -> None:
    steps = [types.SimpleNamespace(total_num_scheduled_tokens=tokens) for tokens in (0, 5)]
    made = engine(asked := OtherExecutor(), batch_queue=[(None, step, None) for step in steps])
    run(made, [False])
    assert not asked.calls
    made.batch_queue.pop()
    run(made, [False])
    assert asked.calls == ["dwdp_help"]


def test_peers_hear_of_a_request_that_comes_beside_some_that_no_step_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """And that the rank is idle again, once no step can take that either, or a call is over."""
    monkeypatch.setattr(core.EngineCoreProc, "_handle_client_request", lambda *_: None)
    made = engine(asked := OtherExecutor())
    made.scheduler.has_requests = lambda: True
    run(made, [True, False])
    made._handle_client_request(EngineCoreRequestType.ADD, (None, 0))
    run(made, [False, False])
    assert asked.calls == ["dwdp_help", "dwdp_expect", "heard", "dwdp_help"]
    made._handle_client_request(EngineCoreRequestType.UTILITY, (0, 0, "profile", ()))
    run(made, [False, False])
    assert asked.calls[4:] == ["dwdp_leave", "dwdp_help"]


@pytest.mark.parametrize("executor", [Executor, OtherExecutor])
def test_peers_do_not_count_on_a_rank_during_other_calls(monkeypatch: pytest.MonkeyPatch, executor: type) -> None:
    asked = executor()
    monkeypatch.setattr(core.EngineCoreProc, "_handle_client_request", lambda self, *_: asked.calls.append("done"))
    made = engine(asked)
    made._handle_client_request(EngineCoreRequestType.UTILITY, (0, 0, "profile", ()))
    assert asked.calls == ["dwdp_leave", "done", "dwdp_help"], "and then helps again"
    made.scheduler.has_requests = lambda: True
    made._handle_client_request(EngineCoreRequestType.UTILITY, (0, 0, "profile", ()))
    assert asked.calls[3:] == ["dwdp_leave", "done"], "its next step says that it comes"
    for method in LOOKS:
        made._handle_client_request(EngineCoreRequestType.UTILITY, (0, 0, method, ()))
    assert asked.calls[5:] == ["done"] * len(LOOKS), "a look asks nothing of the worker, which may be in a step"


@pytest.mark.parametrize("executor", [Executor, OtherExecutor])
def test_peers_hear_of_an_idle_rank_s_first_request(monkeypatch: pytest.MonkeyPatch, executor: type) -> None:
    """Before its step is scheduled; and that the rank helps again, if none could be. Not of one that waits while the engine is paused."""
    def add(self: Any, *_: Any) -> None:
        self.model_executor.calls.append("added")
        self.scheduler.has_requests = lambda: not is_paused

    def ended(meets: bool = True, executed: bool = True) -> list[str]:
        made = engine(asked := executor(), step_fn=lambda: ({}, executed), _meets=meets)
        for _ in range(2):
            made._handle_client_request(EngineCoreRequestType.ADD, (None, 0))
        made._process_engine_step()
        return asked.calls

    is_paused = False
    monkeypatch.setattr(core.EngineCoreProc, "_handle_client_request", add)
    assert ended() == ["added", "dwdp_expect", "added", "heard"]
    assert ended(executed=False) == ["added", "dwdp_expect", "added", "heard", "dwdp_help"]
    assert ended(meets=False) == ["added", "added"], "no step dispatches"
    is_paused = True
    assert ended() == ["added", "added"]


def test_what_fails_as_peers_are_told_ends_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the request is aborted before its step: nobody else asks."""
    def fail() -> None:
        raise did_not_come(1)

    for run in (lambda made: made._process_engine_step(), lambda made: made._process_input_queue()):
        made = engine(Executor(), step_fn=lambda: ({}, True), _expected=types.SimpleNamespace(result=fail))
        with pytest.raises(DWDPError):
            run(made)


@pytest.mark.parametrize("what", ["leave", "expect"])
def test_a_worker_that_is_no_longer_idle_does_not_help_by_itself(what: str) -> None:
    """Between the calls of an engine that has asked it to leave, or has a request: it would say that it is idle again."""
    made, told = object.__new__(worker.DWDPWorker), []
    made.dwdp = types.SimpleNamespace(dispatch=types.SimpleNamespace(**{what: lambda: told.append(what), "help": lambda *_: 1 / 0}))
    made._is_idle = True
    getattr(made, f"dwdp_{what}")()
    made.dwdp_help_until(lambda: False)
    assert told == [what]


def test_why_an_idle_worker_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """It helps between the engine's calls, where nobody asks it for an answer."""
    def help(*_: Any) -> None:
        raise did_not_come(1)

    told: list[BaseException] = []
    monkeypatch.setattr(worker.launcher, "tell", told.append)
    made = object.__new__(worker.DWDPWorker)
    made.dwdp, made._is_idle = types.SimpleNamespace(dispatch=types.SimpleNamespace(help=help)), True
    with pytest.raises(DWDPError):
        made.dwdp_help_until(lambda: False)
    assert [str(error) for error in told] == [str(did_not_come(1))]


@pytest.mark.parametrize("size", [1, 2])
def test_every_rank_s_engine_helps(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Also of ranks that vLLM does not count, each an engine by itself."""
    made = []
    parallel = types.SimpleNamespace(
        data_parallel_size=size, data_parallel_size_local=1, data_parallel_index=0, data_parallel_external_lb=True, numa_bind=False,
        reconfigure_for_independent_dp_rank=lambda: None,
    )
    model = types.SimpleNamespace(is_moe=True, multimodal_config=None)
    given = types.SimpleNamespace(
        additional_config={config.KEY: {"size": 2}}, parallel_config=parallel, model_config=model, kv_transfer_config=None,
    )

    def init(self: Any, *_: Any, engine_index: int, **__: Any) -> None:
        made.append((type(self), engine_index))
        raise KeyError("no further")

    monkeypatch.setattr(core.EngineCoreProc, "__init__", init)
    for name in ("maybe_init_worker_tracer", "set_process_title", "decorate_logs", "maybe_register_config_serialize_by_value"):
        monkeypatch.setattr(core, name, lambda *_: None)
    for name in ("follow_parent", "tell"):
        monkeypatch.setattr(launch.launcher, name, lambda *_: None)
    monkeypatch.setattr(core.signal, "signal", lambda *_: None)
    before = core.EngineCoreProc, core.DPEngineCoreProc
    with pytest.raises(KeyError):
        launch.run_engine_core(vllm_config=given, dp_rank=0)
    assert made == [(IndependentEngineCore, 0)] and before == (core.EngineCoreProc, core.DPEngineCoreProc)


@pytest.mark.parametrize(("is_on", "code", "status"), [(True, None, 143), (True, 0, 143), (True, 3, 3), (False, 0, 0)])
def test_an_engine_that_a_signal_ends_does_not_end_as_if_nobody_missed_it(
    monkeypatch: pytest.MonkeyPatch, is_on: bool, code: int | None, status: int
) -> None:
    """vLLM's engine ends with status 0; its launcher would then end the others and leave the API servers to themselves."""
    def run(*_: Any, **__: Any) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(launch, "_run_engine_core", run)
    monkeypatch.setattr(launch.launcher, "follow_parent", lambda: None)
    given = types.SimpleNamespace(additional_config={config.KEY: {"size": 2}} if is_on else {})
    with pytest.raises(SystemExit) as ended:
        launch.run_engine_core(vllm_config=given, dp_rank=0)
    assert ended.value.code == status


@pytest.mark.parametrize("said", launch.WORKER_ENDED)
def test_the_launcher_hears_that_a_worker_has_ended(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """vLLM's executor knows no reason, and its words name no rank."""
    def run(*_: Any, **__: Any) -> None:
        raise RuntimeError(said)

    told: list[BaseException] = []
    monkeypatch.setattr(launch, "_run_engine_core", run)
    monkeypatch.setattr(launch.launcher, "follow_parent", lambda: None)
    monkeypatch.setattr(launch.launcher, "tell", told.append)
    with pytest.raises(RuntimeError, match=said):
        launch.run_engine_core(vllm_config=types.SimpleNamespace(additional_config={config.KEY: {"size": 2}}), dp_rank=1)
    assert [str(error).partition(" and ")[0] for error in told] == ["the worker of rank 1 has ended"]


class Pooled(AsyncModelRunnerOutput):
    def get_output(self) -> Any:
        return "an embedding"

    def get_kv_connector_output(self) -> None:
        return None


def test_no_embedding_of_a_round_that_a_member_did_not_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pooling model's output comes from the forward itself, and is held against the round like tokens."""
    def check() -> None:
        raise did_not_come(1)

    nothing = lambda *_, **__: None  # noqa: E731
    dispatch = types.SimpleNamespace(begin_step=nothing, end_step=nothing, check=check)
    made = object.__new__(worker.DWDPWorker)
    made.dwdp = types.SimpleNamespace(dispatch=dispatch, prefetcher=types.SimpleNamespace(begin_step=nothing, end_step=nothing))
    made.vllm_config = types.SimpleNamespace(speculative_config=None)
    monkeypatch.setattr(worker.PlatformWorker, "execute_model", lambda *_: Pooled())
    step = types.SimpleNamespace(
        total_num_scheduled_tokens=5, scheduled_encoder_inputs={}, has_sync_kv_loads=False, ec_connector_metadata=None
    )
    output = made.execute_model(step)
    with pytest.raises(worker.DWDPError, match="rank 1 did not come"):
        output.get_output()
    monkeypatch.setattr(worker.PlatformWorker, "execute_model", lambda *_: None)
    assert made.execute_model(step) is None, "tokens are sampled later"


@pytest.mark.parametrize(
    ("first", "is_ready"),
    [
        ({}, True), ({"scheduled_encoder_inputs": {"a": [0]}}, False), ({"has_sync_kv_loads": True}, False),
        ({"ec_connector_metadata": types.SimpleNamespace(mm_datas=[1])}, False),
        ({"ec_connector_metadata": types.SimpleNamespace(loads={}, freed=None)}, True),
        ({"ec_connector_metadata": types.SimpleNamespace(loads=torch.zeros(2))}, False),
        ({"ec_connector_metadata": ("no object with names",)}, False),
    ],
    ids=str,
)
def test_a_step_is_ready_that_has_nothing_to_encode_or_load_first(
    monkeypatch: pytest.MonkeyPatch, first: dict, is_ready: bool
) -> None:
    asked = []
    dispatch = types.SimpleNamespace(begin_step=lambda tokens, is_ready: asked.append((tokens, is_ready)), end_step=lambda: None)
    prefetcher = types.SimpleNamespace(begin_step=lambda *_, **__: None, end_step=lambda *_: None)
    made = object.__new__(worker.DWDPWorker)
    made.dwdp = types.SimpleNamespace(dispatch=dispatch, prefetcher=prefetcher)
    made.vllm_config = types.SimpleNamespace(speculative_config=None)
    monkeypatch.setattr(worker.PlatformWorker, "execute_model", lambda *_: None)
    step = {
        "total_num_scheduled_tokens": 5, "scheduled_encoder_inputs": {}, "has_sync_kv_loads": False, "ec_connector_metadata": None
    }
    made.execute_model(types.SimpleNamespace(**step | first))
    assert asked == [(5, is_ready)]


def test_warm_up_meets_nobody_and_steps_then_do(monkeypatch: pytest.MonkeyPatch) -> None:
    met = []
    made = object.__new__(worker.DWDPWorker)
    made.dwdp = types.SimpleNamespace(dispatch=types.SimpleNamespace(meets=False))
    monkeypatch.setattr(worker.PlatformWorker, "compile_or_warm_up_model", lambda self: met.append(self.dwdp.dispatch.meets) or 7)
    assert made.compile_or_warm_up_model() == 7
    assert met == [False] and made.dwdp.dispatch.meets


def test_vllm_s_watchdog_does_not_watch_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = []

    @contextlib.contextmanager
    def disable() -> Any:
        watched.append("paused")
        yield
        watched.append("goes on")

    if not watchdog.is_there():
        with watchdog.paused():
            assert not watched
    dog = types.ModuleType(watchdog._NAME)
    dog.__spec__ = types.SimpleNamespace(name=watchdog._NAME)  # type: ignore[assignment]
    dog.get_watch_dog = lambda: types.SimpleNamespace(disable=disable)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, watchdog._NAME, dog)
    monkeypatch.setattr(watchdog, "is_there", watchdog.is_there.__wrapped__)
    made = engine(executor := Executor(), input_queue=queue.Queue(), _idle_state_callbacks=[], _active_s=0.0,
                  shutdown_state=core.EngineShutdownState.RUNNING)
    monkeypatch.setattr(executor, "collective_rpc", lambda _: [None])
    made._help_until_work()
    assert watched == ["paused", "goes on"] and not made._meets
