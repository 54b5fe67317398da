"""Many processes: who they are, that all of them are there, and that none of them goes on alone.

    with processes.joined("auto"):
        loop.train(…)

Process 0 listens where the coordinator is said to be; the others call it and keep the line open. So every process knows
who is missing before anything else starts, and learns at once when another one fails or dies. JAX's own service, which
takes the same address after that, notices a host that vanishes without hanging up (`HEARTBEAT_SECONDS`).
"""

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import faceembed

Hosts = Literal["auto", "single", "multi"]

JOIN_SECONDS = 300.0
"""How long a start waits for all processes."""

GRACE_SECONDS = 10.0
"""After the time to join has passed, or another process has failed, a process is gone within this much more."""

HEARTBEAT_SECONDS = 100
"""A host that is cut off or loses power, and so never hangs up, ends the others after this long."""

SEEN_SECONDS = 60.0
"""A file that one host has written is seen by all others within this time, if they share the directory."""

_LONGEST_LINE = 1 << 20
_numbers = itertools.count()


# ---- who we are ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """One process's place among all."""

    process: int
    processes: int
    host: str
    """Where process 0 listens."""
    port: int
    told_by: str
    """What knows all this: "Slurm", "--coordinator", …"""

    def __str__(self) -> str:
        return f"process {self.process} of {self.processes}"


@dataclasses.dataclass(frozen=True)
class _Cluster:
    name: str
    process: int
    processes: int
    coordinator: str | None
    """HOST:PORT; None where the launcher does not say it."""


def placed(
    hosts: Hosts = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Place | None:
    """This process's place among several; None if it is to train alone.

    Args:
      hosts: "single" never looks for others; "multi" insists on them; "auto" takes those that Slurm, Open MPI or an
        indexed Kubernetes job has started.
      coordinator: HOST:PORT of process 0, on which all others can reach it. This and the next two imply "multi", and
        where a launcher was detected they go before what it says.
      num_processes: in all.
      process_id: 0 ≤ process_id < num_processes.

    Raises:
      ValueError: flags that contradict each other, or something is not known; it says what to type.
    """
    flags = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    given = [name for name, value in flags.items() if value is not None]
    if hosts == "single":
        if given:
            raise ValueError(
                f"--hosts single trains in one process alone, and {given[0]} is for several. Leave out --hosts single, or "
                f"{', '.join(given)}."
            )
        return None
    if num_processes is not None and num_processes < 2:
        raise ValueError(
            f"--num-processes is {num_processes}: it counts 2 or more. One process alone needs none of these flags."
        )
    cluster = None if len(given) == len(flags) else _detected()
    if cluster is None and not given:
        if hosts == "multi":
            raise ValueError(
                "--hosts multi, and neither Slurm, Open MPI nor an indexed Kubernetes job has started this process. Start "
                "each process with --coordinator HOST:PORT --num-processes N --process-id I, where I counts from 0."
            )
        return None
    if cluster is not None and cluster.processes == 1 and not given:
        if hosts == "multi":
            raise ValueError(
                f"--hosts multi, and {cluster.name} has started one process. Start more, such as srun --ntasks 2 or "
                "mpirun -n 2, or leave out --hosts multi."
            )
        return None
    if cluster is not None:
        process_id = cluster.process if process_id is None else process_id
        num_processes = cluster.processes if num_processes is None else num_processes
        coordinator = cluster.coordinator if coordinator is None else coordinator
    values = {"--coordinator HOST:PORT": coordinator, "--num-processes N": num_processes, "--process-id I": process_id}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        whom = (
            f"{cluster.name} does not say the rest" if cluster else f"{given[0]} alone does not say who the others are"
        )
        raise ValueError(
            f"{whom}: add {' '.join(missing)}"
            + (", or --hosts single to train in each process alone." if cluster and not given else ".")
        )
    assert coordinator is not None
    assert num_processes is not None
    assert process_id is not None
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process-id is {process_id}, and of {num_processes} processes they are 0 to {num_processes - 1}. The "
            f"first one, on the host of --coordinator, is --process-id 0."
        )
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f"--coordinator is {coordinator!r}: expected HOST:PORT, the host of process 0 and a free port there, such as "
            f"--coordinator {(host or coordinator.partition(':')[0]) or 'node1'}:9473."
        )
    return Place(process_id, num_processes, host, int(port), cluster.name if cluster else "--coordinator")


def _detected() -> _Cluster | None:
    """What has started this process beside others, as far as it says.

    Raises:
      ValueError: it is there and does not answer.
    """
    environment = os.environ
    if "OMPI_COMM_WORLD_SIZE" in environment:
        # Open MPI 5 no longer has the variable that JAX takes the coordinator from.
        known = "OMPI_MCA_orte_hnp_uri" in environment
        name, kind, size, rank = "Open MPI", "OmpiCluster", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"
    elif all(f"SLURM_{part}" in environment for part in ("JOB_ID", "NTASKS", "PROCID", "STEP_NODELIST")):
        known = True
        name, kind, size, rank = "Slurm", "SlurmCluster", "SLURM_NTASKS", "SLURM_PROCID"
    elif "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return _kubernetes(int(environment["JOB_COMPLETION_INDEX"]))
    else:
        return None
    process, processes = int(environment[rank]), int(environment[size])
    if processes == 1 or not known:
        return _Cluster(name, process, processes, None)
    from jax._src import clusters

    # JAX has no public way to ask where its coordinator would be.
    address = getattr(clusters, kind).get_coordinator_address(None, environment.get("JAX_COORDINATOR_PORT"))
    return _Cluster(name, process, processes, address)


def _kubernetes(index: int) -> _Cluster:
    from jax._src import clusters

    by_hand = (
        "Or name the others: --coordinator JOB-0.SERVICE:9473 --num-processes N --process-id $JOB_COMPLETION_INDEX, or "
        "--hosts single."
    )
    try:
        import kubernetes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "this is a pod of an indexed Kubernetes job, and the package that asks for its other pods is missing: pip "
            f"install kubernetes. {by_hand}"
        ) from error
    try:
        clusters.K8sCluster.is_env_present()
        processes = clusters.K8sCluster.get_process_count()
        if processes == 1:
            return _Cluster("Kubernetes", index, 1, None)
        address = clusters.K8sCluster.get_coordinator_address(None, os.environ.get("JAX_COORDINATOR_PORT"))
    except Exception as error:  # whatever its client raises: no answer must not become N trainings
        raise ValueError(f"Kubernetes does not tell this pod of the others: {error}\n{by_hand}") from error
    return _Cluster("Kubernetes", index, processes, address)


def visible_devices(process: int, hellos: Sequence[dict[str, Any]]) -> list[int] | None:
    """Which of its host's GPUs a process takes; None for all that it sees.

    One process drives all GPUs of its host. Where several processes share a host, each takes the GPU of its number among
    them, unless CUDA_VISIBLE_DEVICES has divided the GPUs already.

    Args:
      process: whose.
      hellos: of every process, "host" and "gpus" (its CUDA_VISIBLE_DEVICES or None).
    """
    mine = hellos[process]
    together = [number for number, hello in enumerate(hellos) if hello["host"] == mine["host"]]
    if len(together) == 1 or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        return None
    if any(hellos[number]["gpus"] != mine["gpus"] for number in together):
        return None
    if mine["gpus"] is not None and len(mine["gpus"].split(",")) < len(together):
        return None  # each process's only GPU is called 0 in its own container
    return [together.index(process)]


# ---- joining ---------------------------------------------------------------------------------------------------------


class _Line:
    """One JSON object a line, over a socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._read = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Nothing is said for days: a firewall would forget the line, and a host that is cut off would never be missed.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, HEARTBEAT_SECONDS)

    def send(self, message: dict[str, Any]) -> None:
        """Sends, or does nothing where nobody listens any more: who does not is found out by reading."""
        with contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float | None) -> dict[str, Any] | None:
        """The next message; None when the other side has hung up.

        Raises:
          TimeoutError: none came.
          ValueError: what came is no message.
        """
        until = None if seconds is None else time.monotonic() + seconds
        while b"\n" not in self._read:
            self._socket.settimeout(None if until is None else max(0.001, until - time.monotonic()))
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                if until is None:
                    return None  # the line itself, not the time to wait
                raise
            except OSError:
                return None
            if not data:
                return None
            self._read += data
            if len(self._read) > _LONGEST_LINE:
                raise ValueError("a line without an end")
        line, _, self._read = self._read.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(f"{message!r} is no message")
        return message

    def hung_up(self) -> bool:
        """Whether the other side is gone, without reading what it may have said."""
        self._socket.settimeout(None)
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()


def _hello(place: Place) -> dict[str, Any]:
    return {
        "faceembed": faceembed.__version__,
        "process": place.process,
        "processes": place.processes,
        "host": socket.gethostname(),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _receive_all(place: Place, seconds: float) -> tuple[dict[int, _Line], list[dict[str, Any]]]:
    """Process 0's side of the start: a line to every other process, and what each says of itself."""
    until = time.monotonic() + seconds
    lines: dict[int, _Line] = {}
    hellos = {0: _hello(place)}

    def missing() -> list[int]:
        return [number for number in range(place.processes) if number not in hellos]

    def refuse(reason: str, more: Sequence[_Line] = ()) -> None:
        for line in (*lines.values(), *more):
            line.send({"stop": reason})
            line.close()

    try:
        server = _listen(place.port)
    except OSError as error:
        raise ValueError(
            f"process 0 is to listen on port {place.port}, and cannot here ({error.strerror}): is another training "
            "running with it? Try another --coordinator HOST:PORT."
        ) from error
    with server:
        while missing():
            left = until - time.monotonic()
            if left <= 0:
                reason = _too_few(place, seconds, missing())
                refuse(reason)
                raise TimeoutError(reason)
            server.settimeout(min(1.0, left))
            line, hello = _answer(server, min(5.0, left))
            # A process that was started again calls again; one that has gone is missing.
            for number in [number for number, other in lines.items() if other.hung_up()]:
                lines.pop(number).close()
                del hellos[number]
            if line is not None and hello is not None:
                if problem := _refusal(place, hello, hellos):
                    refuse(problem, [line])
                    raise ValueError(problem)
                lines[hello["process"]], hellos[hello["process"]] = line, hello
            for other in lines.values():
                other.send({"missing": missing()})
    everyone = [hellos[number] for number in range(place.processes)]
    for line in lines.values():
        line.send({"everyone": everyone})
    return lines, everyone


def _answer(server: socket.socket, seconds: float) -> tuple[_Line | None, dict[str, Any] | None]:
    """The next process that calls, if one does: the line and what it says of itself."""
    try:
        line = _Line(server.accept()[0])
    except TimeoutError:
        return None, None
    with contextlib.suppress(TimeoutError, ValueError):
        hello = line.receive(seconds)
        if hello is not None and "faceembed" in hello:
            return line, hello
    line.close()  # a program that is none of ours
    return None, None


def _too_few(place: Place, seconds: float, missing: Sequence[int]) -> str:
    named = ", ".join(map(str, missing[:10])) + (", …" if len(missing) > 10 else "")
    return (
        f"{place.processes - len(missing)} of {place.processes} processes joined within {seconds:g} s; missing: "
        f"{named}. Look at what these printed; each must reach {place.host}:{place.port}. --join-timeout waits longer"
        + (", --hosts single trains alone." if place.told_by != "--coordinator" else ".")
    )


def _refusal(place: Place, hello: dict[str, Any], known: dict[int, dict[str, Any]]) -> str | None:
    """Why a process cannot join, if so."""
    who = f"process {hello['process']} on {hello['host']}"
    if hello["processes"] != place.processes:
        return (
            f"{who} was started as one of {hello['processes']} processes, and process 0 as one of {place.processes}. Give "
            "all the same --num-processes."
        )
    if hello["process"] in known:
        return (
            f"{who} calls, and {known[hello['process']]['host']} has a process {hello['process']} already. Give each its "
            f"own --process-id, 0 to {place.processes - 1}."
        )
    if hello["faceembed"] != faceembed.__version__:
        return f"{who} has faceembed {hello['faceembed']}, and process 0 {faceembed.__version__}. Install one version."
    return None


def _call(place: Place, seconds: float) -> tuple[dict[int, _Line], list[dict[str, Any]]]:
    """The other processes' side of the start: the line to process 0, and what each says of itself."""
    until = time.monotonic() + seconds
    while True:
        missing, trouble = None, "what answers there is no process 0 of faceembed"
        with contextlib.ExitStack() as attempt:
            try:
                line = _Line(socket.create_connection((place.host, place.port), timeout=5))
                attempt.callback(line.close)
                line.send(_hello(place))
                # Process 0 may have begun later: its verdict, which names the missing, is waited for a little longer.
                while message := line.receive(max(0.1, until + GRACE_SECONDS / 2 - time.monotonic())):
                    if "stop" in message:
                        raise _Refused(message["stop"])
                    if "everyone" in message:
                        attempt.pop_all()
                        return {0: line}, message["everyone"]
                    missing, trouble = message["missing"], "it hung up"
            except _Refused as refused:
                raise ValueError(str(refused)) from None
            except TimeoutError:
                if missing is not None:
                    raise TimeoutError(_too_few(place, seconds, missing)) from None
                trouble = "no answer"
            except OSError as error:
                trouble = error.strerror or str(error)
            except ValueError:
                pass  # another program's greeting
        if time.monotonic() > until:
            raise TimeoutError(
                f"{place} has not reached process 0 at {place.host}:{place.port} within {seconds:g} s ({trouble}). Is "
                "process 0 running there, and the port open between the hosts? --coordinator HOST:PORT names another "
                "address, --join-timeout waits longer."
            )
        time.sleep(0.5)


class _Refused(Exception):
    pass


# ---- together --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(
    hosts: Hosts = "auto",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    join_seconds: float = JOIN_SECONDS,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
) -> Iterator[None]:
    """What is inside runs in all processes or in none; see `placed` for the arguments. JAX must not have started yet.

    On entry all processes have joined. If one of them raises or dies, all others end, with the reason on stderr and a
    status that is not 0: at once, or `heartbeat_seconds` after a host was cut off. On exit each waits for the others.
    Inside, only process 0 prints to stdout.

    Args:
      join_seconds: how long to wait for all processes.
      heartbeat_seconds: see `HEARTBEAT_SECONDS`.

    Raises:
      ValueError: as `placed`, or a process was started with other numbers than the rest.
      TimeoutError: not all have joined in time; it names the missing.
    """
    if not join_seconds > 0:
        raise ValueError(f"--join-timeout is {join_seconds:g}: it counts seconds. Try --join-timeout {JOIN_SECONDS:g}.")
    place = placed(hosts, coordinator, num_processes, process_id)
    if place is None:
        yield
        return
    lines, everyone = (_receive_all if place.process == 0 else _call)(place, join_seconds)
    group = _Group(place, lines, everyone)
    try:
        import jax

        # A signal that asks to stop is the training's to handle, see `Agreement`; before it, SIGTERM ends the process.
        jax.config.update("jax_enable_preemption_service", False)
        address = f"[{place.host}]" if ":" in place.host else place.host
        jax.distributed.initialize(
            f"{address}:{place.port}", place.processes, place.process,
            local_device_ids=visible_devices(place.process, everyone), cluster_detection_method="deactivate",
            initialization_timeout=60, heartbeat_timeout_seconds=heartbeat_seconds, shutdown_timeout_seconds=60,
        )  # fmt: skip
        _talk(jax.devices())
        names = ", ".join(dict.fromkeys(hello["host"] for hello in everyone))
        with contextlib.ExitStack() as stack:
            if place.process:
                stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
            print(f"{place.processes} processes, by {place.told_by}, on {names}; {len(jax.devices())} devices")
            yield
            group.leave()
    except BaseException as error:
        group.fail(error)
        raise


def _talk(devices: Sequence[Any]) -> None:
    """A sum over all devices: they can talk to each other, or it shows here and not after an hour of reading photos.

    On CPUs the first one also has to begin within half a minute in all processes, or fails: now nothing delays them.

    Raises:
      ValueError: the sum is wrong.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.sharding.Mesh(np.array(devices), ("all",))
    ones = jax.make_array_from_callback(
        (len(devices),), NamedSharding(mesh, PartitionSpec("all")), lambda _: np.ones(1, np.float32)
    )
    total = float(jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones))
    if total != len(devices):
        raise ValueError(f"a sum over {len(devices)} devices gave {total:g}: do not train on these hosts.")


class _Group:
    """The lines to the other processes while all run, each watched by a thread."""

    def __init__(self, place: Place, lines: dict[int, _Line], everyone: list[dict[str, Any]]) -> None:
        self._place, self._lines, self._everyone = place, lines, everyone
        self._leaving = False
        for number, line in lines.items():
            threading.Thread(target=self._watch, args=(number, line), daemon=True).start()

    def _name(self, number: int) -> str:
        return f"process {number} of {self._place.processes} ({self._everyone[number]['host']})"

    def _watch(self, number: int, line: _Line) -> None:
        try:
            message = line.receive(None)
        except ValueError:
            message = None
        if self._leaving or (message and "leaves" in message):
            return
        self._end(
            message["stop"]
            if message
            else f"{self._name(number)} is gone without a word: killed, out of memory, or its line was cut."
        )

    def _end(self, reason: str) -> NoReturn:
        """Ends this process, whatever it is doing: it may be waiting for the one that is gone, and not in Python."""
        for line in self._lines.values():
            line.send({"stop": reason})
        print(f"\nerror: {reason} So {self._place} ends, too.", file=sys.stderr, flush=True)
        self._let_others_end()
        os._exit(1)

    def _let_others_end(self) -> None:
        """JAX's coordinator is in process 0, and ends the others without the reason if it goes before them."""
        if self._place.process == 0:
            time.sleep(2)

    def fail(self, error: BaseException) -> None:
        """Tells the others that this process ends, and why; they end."""
        import jax

        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(2)  # what others did may be the cause: then the line tells it now, better than this error does
        self._leaving = True
        mine = self._name(self._place.process)
        told = f"{type(error).__name__}: {error}".removesuffix(": ").removesuffix(".")
        for line in self._lines.values():
            line.send({"stop": f"{mine} stopped: {told}."})
        print(f"\n{mine} stops, and the others with it:", file=sys.stderr, flush=True)
        self._let_others_end()

        def end_now() -> None:
            # JAX would wait for the others, who no longer answer.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130 if isinstance(error, KeyboardInterrupt) else 1)

        atexit.register(end_now)

    def leave(self) -> None:
        """Waits until all have finished."""
        import jax

        from_all("end", None)
        jax.distributed.shutdown()
        self._leaving = True
        for line in self._lines.values():
            line.send({"leaves": True})


# ---- talking ---------------------------------------------------------------------------------------------------------


def from_all(name: str, value: Any) -> list[Any]:
    """Every process's value, in their order; waits for all. All processes ask for the same things in the same order.

    Not by the devices: their collectives give up after half a minute, and a process may have to wait for hours.

    Args:
      name: of what is asked for.
      value: this process's; JSON's types.
    """
    import jax
    from jax._src import distributed  # its store of names and values has no public name

    client = distributed.global_state.client
    if client is None:
        return [value]
    key = f"faceembed/{next(_numbers)}/{name}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))

    def wait(number: int) -> Any:
        while True:
            try:
                return json.loads(client.blocking_key_value_get(f"{key}/{number}", 2000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                # Only between calls does Python see Ctrl-C.

    return [wait(number) for number in range(jax.process_count())]


class Agreement:
    """SIGTERM to any process, and the update after which all of them stop.

    The protocol is JAX's (`multihost_utils.reached_preemption_sync_point`), in an instance of our own: Orbax asks the
    shared one, too, about steps that are long past, and that turns its counter back.
    """

    def __init__(self) -> None:
        from jax._src import distributed
        from jax._src.lib import _jax

        self._manager = _jax.create_preemption_sync_manager()
        self._manager.initialize(distributed.global_state.client)

    def reached(self, step: int) -> bool:
        """Whether all stop after this update; to be asked after every one. None waits for another."""
        return bool(self._manager.reached_sync_point(step))

    def close(self) -> None:
        """Leaves SIGTERM alone; the handler that was there before is the caller's to put back."""
        self._manager.shutdown()


def from_first(name: str, value: Any) -> Any:
    """Process 0's value, in every process; see `from_all`."""
    return from_all(name, value)[0]


def require_same(name: str, facts: dict[str, Any]) -> None:
    """Refuses processes that were started differently.

    Args:
      name: of what is compared.
      facts: this process's; JSON's types, nested as they like.

    Raises:
      ValueError: in every process, naming each fact that differs and whose.
    """
    gathered = [dict(_flat(part)) for part in from_all(name, facts)]
    differ = [
        f"{key} is {other.get(key)!r} in process {number}, {gathered[0].get(key)!r} in process 0"
        for number, other in enumerate(gathered)
        for key in gathered[0] | other
        if other.get(key) != gathered[0].get(key)
    ]
    if differ:
        more = f"\n  and {len(differ) - 10} more" if len(differ) > 10 else ""
        raise ValueError(
            f"the processes do not have the same {name}:\n  "
            + "\n  ".join(differ[:10])
            + f"{more}\nStart all of them with the same command, on the same data."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def require_shared(run: Path) -> None:
    """Refuses a run directory that is not one for all processes.

    Raises:
      ValueError: in every process, naming the hosts that see another one.
    """
    import jax

    if jax.process_count() == 1:
        return
    mark: str = from_first("mark", f".shared-{secrets.token_hex(4)}")
    try:
        if jax.process_index() == 0:
            (run / mark).touch()
        from_all("marked", None)
        until = time.monotonic() + SEEN_SECONDS
        # A network file system may remember for a while that there was no such file: listing asks anew.
        while not (seen := run.is_dir() and mark in os.listdir(run)) and time.monotonic() < until:
            time.sleep(0.2)
        answers = from_all("seen", [seen, socket.gethostname()])
    finally:
        if jax.process_index() == 0:
            (run / mark).unlink(missing_ok=True)
    others = [f"process {number} on {host}" for number, (seen, host) in enumerate(answers) if not seen]
    if others:
        raise ValueError(
            f"{run} on process 0 is another directory than on {', '.join(others[:10])}: checkpoints are written by all "
            "processes into one. Give a --run-dir on a file system that all hosts share."
        )
