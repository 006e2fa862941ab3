"""Two "hosts" on one Linux machine, for a run by hostfile: each has its own network, processes and sshd, and a cable
joins them.

Everything lives in anonymous namespaces: when a host's first process ends, its processes, its network and the cable
are gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ranks import ROOT, environment

PROGRAMS = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}


def missing() -> str | None:
    """Why two hosts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "needs root (network and process namespaces)"
    lacking = {package for program, package in PROGRAMS.items() if not _which(program)}
    if lacking:
        return f"needs the packages {', '.join(sorted(lacking))}"
    probe = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True
    )
    return f"may not make namespaces: {probe.stderr.strip()}" if probe.returncode else None


@dataclass
class Host:
    """A host by its address. first: process id of its first process, as this machine sees it."""

    address: str
    first: int
    keeper: subprocess.Popen[str]

    def run(self, command: list[str], **options) -> subprocess.Popen[str]:
        """Start a command on this host."""
        enter = ["nsenter", "--target", str(self.first), "--net", "--pid", "--mount", "--uts", f"--wd={ROOT}"]
        return subprocess.Popen(
            [*enter, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
        )

    def processes(self, part: str) -> list[int]:
        """Ids of this host's processes whose command line contains ``part``."""
        here = os.readlink(f"/proc/{self.first}/ns/pid")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns" / "pid") == here and part in (entry / "cmdline").read_text().replace(
                    "\0", " "
                ):
                    found.append(int(entry.name))
        return found

    def stop(self) -> None:
        """End the host and everything on it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.first, signal.SIGKILL)
        self.keeper.wait(30)


@dataclass
class Cluster:
    """hosts: both.  folder: keys, configuration and a hostfile.  env: of commands that use them."""

    folder: Path
    hosts: list[Host] = field(default_factory=list)

    @property
    def hostfile(self) -> Path:
        return self.folder / "hosts"

    @property
    def env(self) -> dict[str, str]:
        path = os.pathsep.join(
            [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"]
        )
        return environment() | {
            "PATH": path,
            "DS_ENV_FILE": str(self.folder / "deepspeed_env"),
            "DS_ACCELERATOR": "cpu",
        }

    def deepspeed(self, *arguments: str) -> subprocess.Popen[str]:
        """Start ``deepspeed --hostfile ...`` on the first host."""
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(self.hostfile)]
        return self.hosts[0].run([*launcher, "--master_addr", self.hosts[0].address, *arguments], env=self.env)


@contextlib.contextmanager
def two_hosts(folder: Path, slots: int = 1) -> Iterator[Cluster]:
    """Make the hosts, with sshd running and ssh from one to the other without a password; take them down again."""
    cluster = Cluster(folder)
    _write_files(folder)
    try:
        for _ in range(2):
            cluster.hosts.append(_start(folder, f"10.77.0.{len(cluster.hosts) + 1}"))
        one, two = cluster.hosts
        cable = f"ip link add name eth0 netns {one.first} type veth peer name eth0 netns {two.first}"
        subprocess.run(cable.split(), check=True)
        for host in cluster.hosts:
            script = f"ip addr add {host.address}/24 dev eth0 && ip link set eth0 up && ip link set lo up"
            subprocess.run(["nsenter", "--target", str(host.first), "--net", "sh", "-c", script], check=True)
        cluster.hostfile.write_text("".join(f"{host.address} slots={slots}\n" for host in cluster.hosts))
        (folder / "deepspeed_env").write_text(_exports(cluster.env))
        for host in cluster.hosts:
            _wait_for_sshd(cluster, host)
        yield cluster
    finally:
        for host in cluster.hosts:
            host.stop()


def _which(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")


def _exports(env: dict[str, str]) -> str:
    """What has to reach both hosts; PYTHON* travels by itself."""
    names = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "HOME")
    values = {name: env[name] for name in names if name in env} | {"GLOO_SOCKET_IFNAME": "eth0", "HF_HUB_OFFLINE": "1"}
    return "".join(f"{name}={value}\n" for name, value in values.items())


def _write_files(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    (folder / "sshd_config").write_text(
        f"HostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\n"
        "PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nPidFile none\nMaxStartups 100\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  UserKnownHostsFile /dev/null\n"
        "  StrictHostKeyChecking no\n  LogLevel ERROR\n  User root\n"
    )
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {_which("ssh")} -F {folder}/ssh_config "$@"\n')
    wrapper.chmod(0o755)


def _start(folder: Path, address: str) -> Host:
    script = f"mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec {_which('sshd')} -D -f {folder}/sshd_config"
    # Dies with the tests' process, and the host's first process dies with it.
    guard = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--net",
        "--uts",
        "--pid",
        "--fork",
        "--mount-proc",
        "--kill-child",
    ]
    keeper = subprocess.Popen(
        [*guard, "sh", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    children = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children")
    deadline = time.monotonic() + 30
    while not (first := children.read_text().split()):
        assert keeper.poll() is None, "a host's first process did not start"
        assert time.monotonic() < deadline, "a host's first process did not start"
    return Host(address, int(first[0]), keeper)


def _wait_for_sshd(cluster: Cluster, host: Host) -> None:
    deadline = time.monotonic() + 60
    while True:
        probe = cluster.hosts[0].run(
            ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", host.address, "true"], env=cluster.env
        )
        output, _ = probe.communicate()
        if probe.returncode == 0:
            return
        assert time.monotonic() < deadline, f"no sshd at {host.address}: {output}"
        time.sleep(0.1)
