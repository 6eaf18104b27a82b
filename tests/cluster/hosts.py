"""Hosts on one machine, each with its own address, processes, home, shared memory and SSH server.

A host is a set of Linux namespaces without names: it lasts as long as its processes, and these die with the process
that started them. So nothing is left to clean up, neither after Ctrl+C nor after a crash.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import psutil

import nuciseg

NETWORK = "10.77.0"  # exists inside of the hosts alone
SHARED_MEMORY = "4g"  # a bound, nothing is taken beforehand
HOME = pwd.getpwuid(0).pw_dir
REPOSITORY = Path(__file__).resolve().parents[2]
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "unshare")
_COMMANDS = {
    "setpriv": "util-linux", "unshare": "util-linux", "nsenter": "util-linux", "ip": "iproute2", "rsync": "rsync",
    "ssh": "openssh-client", "ssh-keygen": "openssh-client", "/usr/sbin/sshd": "openssh-server",
}  # fmt: skip

_SSHD = """\
HostKey {home}/.hostkey
AuthorizedKeysFile {home}/.ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
MaxStartups 100
MaxSessions 100
ClientAliveInterval 5
Subsystem sftp internal-sftp
"""

# The host's folders go over the machine's; what it shares with the machine is kept aside first, and put back read-only
# unless it is to be written to.
_BOOT = """\
set -eu
hostname "$1"; folder=$2; home=$3; memory=$4; shift 4
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/host /run/sshd
mount --bind "$folder" /run/host
number=0
for visible in "$@"; do
    number=$((number + 1)); mkdir -p "/run/visible/$number"; mount --rbind "${visible#*:}" "/run/visible/$number"
done
mount --bind /run/host/home "$home"
mount --bind /run/host/tmp /tmp
mount --bind /run/host/hosts /etc/hosts
if [ -e /etc/resolv.conf ]; then mount --bind /run/host/resolv.conf "$(readlink -f /etc/resolv.conf)"; fi
mount -t tmpfs -o "size=$memory" tmpfs /dev/shm
. /run/host/boot
number=0
for visible in "$@"; do
    number=$((number + 1)); path=${visible#*:}
    mkdir -p "$path"; mount --rbind "/run/visible/$number" "$path"
    if [ "${visible%%:*}" = ro ]; then mount -o remount,bind,ro "$path"; fi
done
exec /usr/sbin/sshd -D -e -f "$home/.sshd_config"
"""


def why_no_hosts() -> str | None:
    """Why this machine can make no hosts, with the cure; None where it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "hosts are made of Linux namespaces, which takes root"
    missing = {package for command, package in _COMMANDS.items() if shutil.which(command) is None}
    if missing:
        return f"hosts need Debian packages that are missing: apt-get install {' '.join(sorted(missing))}"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-c", "ip link add name bridge0 type bridge && mount -t tmpfs none /run"],
        capture_output=True,
        text=True,
    )
    return f"this root may make no bridge or no mount: {tried.stderr.strip()}" if tried.returncode else None


class Host:
    """One machine of a `Lan`: commands run there, processes are counted, the power is cut."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name = name
        self.address = address
        self.folder = folder
        self.home = folder / "home"  # as seen from outside
        self.process: subprocess.Popen[bytes] | None = None  # None while the power is off

    def run(
        self, command: str, *, timeout_s: float, check: bool = True, cwd: str | Path = HOME
    ) -> subprocess.CompletedProcess[str]:
        """Run a shell command as a login would, and return what it printed, errors among the rest.

        Raises AssertionError with the last lines that it printed where it fails and `check` is set.
        """
        done = subprocess.run(
            self._entered(command, cwd),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        said = "\n".join(done.stdout.splitlines()[-60:])
        assert not check or done.returncode == 0, f"{self.name}: {command}: {done.returncode}\n{said}"
        return done

    def start(self, command: str, log: Path, *, cwd: str | Path = HOME) -> subprocess.Popen[bytes]:
        """Start a shell command that stays, with its output in `log`; it ends with the host at the latest."""
        with log.open("wb") as output:
            return subprocess.Popen(
                self._entered(command, cwd),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def processes(self) -> list[str]:
        """The command lines of all that runs here, SSH server and its connections left out."""
        first = self._first_process()
        lines = []
        for process in first.children(recursive=True) if first is not None else []:
            try:
                line = " ".join(process.cmdline())
                if process.status() != psutil.STATUS_ZOMBIE and not line.startswith("sshd"):
                    lines.append(line)
            except psutil.NoSuchProcess:
                continue
        return lines

    def listens(self, port: int) -> bool:
        """Whether a process of this host takes connections at `port` of IPv4."""
        table = Path(f"/proc/{self.process.pid}/net/tcp") if self.process is not None else None
        if table is None or not table.exists():
            return False
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
        return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)

    def power_off(self) -> None:
        """A power cut: every process is gone when this returns and nobody was told. The files stay."""
        if self.process is not None:
            first = self._first_process()
            self.process.kill()
            self.process.wait()
            self.process = None
            # The kernel ends the first process of a namespace after all others of it.
            wait_for(lambda: first is None or _has_ended(first), f"the end of all that ran on {self.name}", 60, 0.01)

    def _entered(self, command: str, cwd: str | Path) -> list[str]:
        first = self._first_process()
        assert first is not None, f"host {self.name} is off"
        inside = f"cd {shlex.quote(str(cwd))} || exit\n. ~/.bashrc\n{command}"
        plain = [f"HOME={HOME}", "USER=root", "LOGNAME=root", "SHELL=/bin/bash", "LANG=C.UTF-8", "TERM=dumb"]
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return ["nsenter", f"--target={first.pid}", "--mount", "--net", "--pid", "--uts", "--ipc", "--",
                "env", "--ignore-environment", *plain, path, "bash", "-c", inside]  # fmt: skip

    def _first_process(self) -> psutil.Process | None:
        try:
            children = psutil.Process(self.process.pid).children() if self.process is not None else []
        except psutil.NoSuchProcess:
            return None
        return children[0] if children else None


class Lan:
    """A switch and the hosts on it; leaving the block cuts all power.

    Hosts see this machine's Python and repository, read-only, at the paths that these have here, and the folders of
    `shared`, which they may write to. Only hosts that are added with `has_key` can log in to the others.
    """

    def __init__(self, folder: Path, shared: Iterable[Path] = ()) -> None:
        self._folder = folder
        python = {Path(sys.base_prefix), Path(sys.prefix), Path(nuciseg.__file__).resolve().parents[1], REPOSITORY}
        self._visible = [f"ro:{path.resolve()}" for path in sorted(python)]
        self._visible += [f"rw:{path.resolve()}" for path in shared]
        self._hosts: list[Host] = []
        self._switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Lan:
        self._folder.mkdir(parents=True, exist_ok=True)
        for key in ("user_key", "host_key"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "nuciseg", "-f", str(self._folder / key))
        self._switch = subprocess.Popen([*_DIES_WITH_US, "--net", "sleep", "infinity"], start_new_session=True)
        _wait_for_network(self._switch)
        self._at_switch("ip", "link", "add", "name", "bridge0", "type", "bridge")
        self._at_switch("ip", "addr", "add", f"{NETWORK}.254/24", "dev", "bridge0")
        self._at_switch("ip", "link", "set", "bridge0", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as ends:  # each of them, whatever the others raise
            if self._switch is not None:
                ends.callback(self._switch.wait)
                ends.callback(self._switch.kill)
            for host in self._hosts:
                ends.callback(host.power_off)

    def add(self, name: str, number: int, *, has_key: bool = False, login: Sequence[str] = (), boot: str = "") -> Host:
        """Start a new host with address 10.77.0.`number`.

        `login` are lines for its ~/.bashrc, `boot` is shell that root runs each time before the SSH server starts, with
        the host's own folder as /run/host.
        """
        host = Host(name, f"{NETWORK}.{number}", self._folder / name)
        self._hosts.append(host)
        self._furnish(host, has_key, login)
        (host.folder / "boot").write_text(boot)
        self.power_on(host)
        return host

    def power_on(self, host: Host, limit_s: float = 60.0) -> None:
        """Start a host that is off, with the files it has, and wait for its SSH server.

        Raises AssertionError with what the host said where it does not come up.
        """
        log_path = host.folder / "sshd.log"
        boot = ["boot", host.name, str(host.folder.resolve()), HOME, SHARED_MEMORY, *self._visible]
        namespaces = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*_DIES_WITH_US, *namespaces, "bash", "-c", _BOOT, *boot],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        host.process = process
        self._lay_cable(host)
        deadline = time.monotonic() + limit_s
        while not host.listens(22):
            said = log_path.read_text(errors="replace")
            assert process.poll() is None, f"host {host.name} ended while it started: {said}"
            assert time.monotonic() < deadline, f"host {host.name} has no SSH server after {limit_s:.0f} s: {said}"
            time.sleep(0.05)

    def cut_off(self, host: Host) -> None:
        """Unplug the cable of a host: it runs on and hears nothing, and the others do not even hear it hang up."""
        self._at_switch("ip", "link", "set", _port(host), "down")

    def plug_in(self, host: Host) -> None:
        """Give a host back the cable that `cut_off` took."""
        self._at_switch("ip", "link", "set", _port(host), "up")

    def _furnish(self, host: Host, has_key: bool, login: Sequence[str]) -> None:
        (host.home / ".ssh").mkdir(parents=True, mode=0o700)
        host.home.chmod(0o700)
        (host.folder / "tmp").mkdir()
        (host.folder / "tmp").chmod(0o1777)
        (host.folder / "hosts").write_text(f"127.0.0.1 localhost\n{host.address} {host.name}\n")
        (host.folder / "resolv.conf").touch()  # names that are asked for are refused at once, not after a time
        shutil.copy(self._folder / "host_key", host.home / ".hostkey")
        shutil.copy(self._folder / "user_key.pub", host.home / ".ssh/authorized_keys")
        if has_key:
            shutil.copy(self._folder / "user_key", host.home / ".ssh/id_ed25519")
            shutil.copy(self._folder / "user_key.pub", host.home / ".ssh/id_ed25519.pub")
        (host.home / ".sshd_config").write_text(_SSHD.format(home=HOME))
        lines = [
            f"export PATH={sys.prefix}/bin:$PATH",
            # All hosts have the same cores: a thread that spins while it waits takes what another host needs.
            "export OMP_WAIT_POLICY=passive",
            *login,
            "",
        ]
        (host.home / ".bashrc").write_text("\n".join(lines))

    def _lay_cable(self, host: Host) -> None:
        assert self._switch is not None
        assert host.process is not None
        _wait_for_network(host.process)
        port, pid = _port(host), host.process.pid
        card = f"02:00:00:00:00:{int(host.address.rsplit('.', 1)[1]):02x}"  # the same again: the others remember it
        link = ["ip", "link", "add", "name", "eth0", "address", card, "netns", str(pid), "type", "veth"]
        _call(*link, "peer", "name", port, "netns", str(self._switch.pid))
        self._at_switch("ip", "link", "set", port, "master", "bridge0", "up")
        for line in (
            f"addr add {host.address}/24 dev eth0", "link set eth0 up", "link set lo up",
            f"route add default via {NETWORK}.254",  # Ray asks the default route for the host's own address
        ):  # fmt: skip
            _call("nsenter", f"--net=/proc/{pid}/ns/net", "ip", *line.split())

    def _at_switch(self, *command: str) -> None:
        assert self._switch is not None
        _call("nsenter", f"--net=/proc/{self._switch.pid}/ns/net", *command)


def _port(host: Host) -> str:
    """At the switch. Not by its name alone: the port of a host that was here before may still be on its way out."""
    assert host.process is not None, f"host {host.name} is off"
    return f"port{host.process.pid}"


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(
    true: Callable[[], bool], what: str, limit_s: float, step_s: float = 0.5, told: Callable[[], str] = str
) -> None:
    """Look again and again until `true()`; raises AssertionError with `what` was waited for and what is `told` then."""
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}\n{told()}"
        time.sleep(step_s)


def _wait_for_network(process: subprocess.Popen[bytes]) -> None:
    ours = os.readlink("/proc/self/ns/net")
    wait_for(lambda: os.readlink(f"/proc/{process.pid}/ns/net") != ours, "a network namespace", 30.0, step_s=0.01)


def _call(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr.strip()}"
