"""A real SLURM on this machine: slurmctld, slurmd, munged, and GPUs that only SLURM believes in.

It runs as the user who starts it, from the packages that `envs/setup.py --slurm` unpacks, with a
configuration, ports and folders of its own.
"""

import getpass
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / ".tools/slurm"
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmstepd", "sbatch", "srun")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld_port}
SlurmdPort={slurmd_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
{plugins}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/completed.log
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=15
KillWait={kill_wait}
OverTimeLimit=0
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=16 RealMemory=64000 Gres=gpu:fake:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE
PartitionName=urgent Nodes=ALL PriorityTier=2 MaxTime=INFINITE
"""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def find_programs() -> dict[str, Path]:
    """Return the path of each program that is there, by its name."""
    folders = [TOOLS / "usr/bin", TOOLS / "usr/sbin", Path("/usr/sbin"), Path("/usr/bin")]
    # Debian's packages name them slurmd-wlm, and a script of theirs makes the links.
    paths = [
        folder / f"{name}{end}" for end in ("", "-wlm") for folder in folders for name in PROGRAMS
    ]
    return {path.name.removesuffix("-wlm"): path for path in reversed(paths) if path.exists()}


def free_port() -> int:
    """Return the number of a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class SlurmCluster:
    """A cluster of one node.

    Attributes:
        environment: in which sbatch and the others find it.
    """

    def __init__(self, folder: Path, gpus: int = 2, kill_wait: int = 30):
        """Write the configuration and start the daemons; the folder's path must be short."""
        self.folder, self.programs = folder, folder / "bin"
        self.programs.mkdir()
        # A daemon that has another name takes itself for a command and forgets its GPUs.
        for name, path in find_programs().items():
            (self.programs / name).symlink_to(path)
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        paths = [self.programs, TOOLS / "usr/bin", os.environ["PATH"]]
        self.environment["PATH"] = os.pathsep.join(map(str, paths))
        plugins = next(TOOLS.glob("usr/lib/*/slurm*/"), None)
        if plugins:
            libraries = [plugins, plugins.parent, os.environ.get("LD_LIBRARY_PATH")]
            self.environment["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, filter(None, libraries)))
        for name in ("munge", "state", "spool"):
            (folder / name).mkdir(parents=True, mode=0o700)
        (folder / "munge/key").write_bytes(os.urandom(64))
        (folder / "munge/key").chmod(0o600)
        host = socket.gethostname().split(".")[0]
        text = CONFIGURATION.format(
            folder=folder,
            host=host,
            user=getpass.getuser(),
            slurmctld_port=free_port(),
            slurmd_port=free_port(),
            gpus=gpus,
            kill_wait=kill_wait,
            plugins=f"PluginDir={plugins}" if plugins else "",
        )
        (folder / "slurm.conf").write_text(text)
        # The plugin drops SLURM's variables before srun; another cluster has the default place.
        srun = find_programs()["srun"]
        (self.programs / "srun").unlink()
        (self.programs / "srun").write_text(
            f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {srun} "$@"\n'
        )
        (self.programs / "srun").chmod(0o755)
        lines = [f"Name=gpu Type=fake File={device}\n" for device in DEVICES[:gpus]]
        (folder / "gres.conf").write_text("".join(lines))
        self.daemons: dict[str, subprocess.Popen] = {}
        socket_file = folder / "munge/socket"
        self._start(
            "munged",
            "--foreground",
            "--force",
            *(f"--{key}={folder}/munge/{key}" for key in ("socket",)),
            f"--key-file={folder}/munge/key",
            f"--pid-file={folder}/munge/pid",
            f"--seed-file={folder}/munge/seed",
            f"--log-file={folder}/munge/log",
        )
        self._wait_for(socket_file.exists)
        self._start("slurmctld", "-D")
        self.start_slurmd()
        self._wait_for(lambda: "idle" in self.command("sinfo", "-h", "-o", "%T"))

    def _start(self, name: str, *words: str) -> None:
        log = open(self.folder / f"{name}.out", "a")  # noqa: SIM115
        self.daemons[name] = subprocess.Popen(
            [self.programs / name, *words],
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def start_slurmd(self) -> None:
        """Start the node's daemon."""
        self._start("slurmd", "-D", "-d", str(self.programs / "slurmstepd"))

    def kill_slurmd(self) -> None:
        """Kill the node's daemon (SIGKILL); what it started lives on."""
        self.daemons["slurmd"].kill()
        self.daemons["slurmd"].wait()

    def _wait_for(self, condition, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                logs = [path.read_text() for path in self.folder.glob("*.out")]
                raise RuntimeError(f"SLURM does not start, {ended} ended:\n" + "\n".join(logs))
            time.sleep(0.2)

    def command(self, *words: str) -> str:
        """Run one of SLURM's commands and return what it prints, or "" if it fails."""
        return subprocess.run(words, env=self.environment, capture_output=True, text=True).stdout

    def stop(self) -> None:
        """Cancel all jobs and end the daemons."""
        self.command("scancel", "--signal=KILL", "--user", getpass.getuser())
        self.command("scancel", "--user", getpass.getuser())
        time.sleep(1)
        for name in ("slurmd", "slurmctld", "munged"):
            daemon = self.daemons.get(name)
            if daemon and daemon.poll() is None:
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
