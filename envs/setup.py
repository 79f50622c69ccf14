"""Set-up of a fresh machine: uv, the locked Python environments, and a Vulkan device.

`make setup` runs it with any python3 from 3.9 on. What is there already is left alone; a second run
takes a second. It must run before anything is installed, so it uses the standard library alone.
"""

import argparse
import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".tools"
ENVIRONMENT_FILE = TOOLS / "environment"
INDEX = "https://pypi.org/simple/"
UV_VERSION = "0.13.9"
UV_MINIMUM = (0, 7)
PYTHON = "3.12"
PYTHON_NAME = "python" + PYTHON
BACKEND_VARIABLE = "DEMO2EVAL_RENDER_BACKEND"
# The second is that of Windows' Linux.
GPU_DEVICES = ("/dev/nvidia[0-9]*", "/dev/dxg")
MESA_MAJOR = 25
MESA_PACKAGES = ["mesa-vulkan-drivers", "libvulkan1"]
SLURM_PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge"]


class SetupError(Exception):
    """What is missing and how to get it, in one sentence."""


def say(text):
    """Print one line at once."""
    print("setup: " + text, flush=True)


def output_of(*command):
    """Return what a command prints, or None if it is missing or fails."""
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


# uv


def is_recent(version):
    """Whether the output of `uv --version` is that of a uv that can read our lock files."""
    found = re.match(r"uv (\d+)\.(\d+)", version or "")
    return bool(found) and tuple(map(int, found.groups())) >= UV_MINIMUM


def find_uv():
    """Return a uv that runs and is recent enough, fetched before or the system's, or None."""
    for candidate in (str(TOOLS / "uv"), shutil.which("uv")):
        if candidate and is_recent(output_of(candidate, "--version")):
            return candidate
    return None


def fetch_uv_with_pip(folder):
    """Fetch uv's wheel into a folder with pip; return its path, or None if pip does not work."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--disable-pip-version-check",
        "-d",
        str(folder),
    ]
    try:
        subprocess.run(
            [*command, "uv==" + UV_VERSION],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(folder.glob("*.whl"), None)


def fetch_uv_from_index(folder):
    """Fetch uv's wheel into a folder from PyPI without pip, check its hash, and return its path."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    index = urllib.request.Request(
        INDEX + "uv/", headers={"Accept": "application/vnd.pypi.simple.v1+json"}
    )
    try:
        with urllib.request.urlopen(index, timeout=60) as response:
            files = json.load(response)["files"]
        built = [
            item
            for item in files
            if item["filename"].startswith(f"uv-{UV_VERSION}-py3-none-manylinux")
        ]
        wheel = next((item for item in built if machine in item["filename"]), None)
        if wheel is None:
            raise SetupError(
                f"there is no uv {UV_VERSION} for this machine ({machine}); only Linux on x86_64 "
                "has been tried."
            )
        with urllib.request.urlopen(
            urllib.parse.urljoin(index.full_url, wheel["url"]), timeout=300
        ) as response:
            content = response.read()
    except (OSError, KeyError, ValueError) as error:
        raise SetupError(
            f"uv could not be fetched ({error}); install it as https://docs.astral.sh/uv says, and "
            "run `make setup` again."
        ) from None
    if hashlib.sha256(content).hexdigest() != wheel["hashes"].get("sha256"):
        raise SetupError("uv was fetched damaged; run `make setup` again.")
    path = folder / wheel["filename"]
    path.write_bytes(content)
    return path


def get_uv():
    """Return the path of uv, fetching it into .tools if it is missing."""
    uv = find_uv()
    if uv:
        return uv
    say(f"fetching uv {UV_VERSION}")
    TOOLS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOOLS) as folder:
        wheel = fetch_uv_with_pip(Path(folder)) or fetch_uv_from_index(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            name = next(item for item in archive.namelist() if item.endswith("/scripts/uv"))
            (TOOLS / "uv").write_bytes(archive.read(name))
    (TOOLS / "uv").chmod(0o755)
    if not output_of(str(TOOLS / "uv"), "--version"):
        raise SetupError(
            "the uv that was fetched does not run on this machine; install it as "
            "https://docs.astral.sh/uv says."
        )
    return str(TOOLS / "uv")


# Python


def python_candidates():
    """Yield places where a Python 3.12 may be."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield os.path.join(folder, PYTHON_NAME)
    for pattern in (
        f"~/.pyenv/versions/{PYTHON}*/bin",
        f"/opt/python{PYTHON}*/bin",
        "/usr/local/bin",
    ):
        yield from sorted(
            glob.glob(os.path.join(os.path.expanduser(pattern), PYTHON_NAME)), reverse=True
        )


def find_python():
    """Return a Python 3.12 that runs, or None.

    It is named by its real path: a shim would mislead uv.
    """
    for candidate in python_candidates():
        if os.path.isfile(candidate):
            output = output_of(
                candidate,
                "-c",
                "import sys, venv; print('%d.%d' % sys.version_info[:2], sys.executable)",
            )
            if output and output.startswith(PYTHON + " "):
                return output.split(" ", 1)[1].strip()
    return None


# Environments


def has_nvidia_gpu():
    """Whether an NVIDIA driver lists a GPU; as `demo2eval.maniskill.env.render_backend` asks."""
    if not any(glob.glob(pattern) for pattern in GPU_DEVICES):
        return False
    return (output_of("nvidia-smi", "-L") or "").startswith("GPU ")


def renders_on_gpu(gpu):
    """Whether the GPU renders images: where there is one, unless the user says otherwise."""
    backend = os.environ.get(BACKEND_VARIABLE)
    if backend and backend not in ("cpu", "gpu"):
        raise SetupError(f"{BACKEND_VARIABLE} is {backend!r}; set it to cpu or gpu, or not at all.")
    return backend == "gpu" if backend else gpu


def sync(uv, folder, *options):
    """Make the environment folder/.venv as folder/uv.lock says, unless that was done already."""
    content = b"".join((folder / name).read_bytes() for name in ("uv.lock", "pyproject.toml"))
    stamp_text = hashlib.sha256(content + repr(options).encode()).hexdigest()
    stamp = folder / ".venv" / ".demo2eval-stamp"
    command = [uv, "sync", "--locked", "--quiet", "--project", str(folder), *options]
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")
    }
    # The stamp knows whether uv came to its end, and uv whether anything has gone since then; a
    # user's own additions may stay.
    if (
        stamp.exists()
        and stamp.read_text() == stamp_text
        and (folder / ".venv/bin/python").exists()
    ):
        check = subprocess.run(
            [*command, "--check", "--inexact", "--offline"],
            env=env,
            stderr=subprocess.DEVNULL,
        )
        if check.returncode == 0:
            return
    python = find_python()
    # What is half changed is not what the stamp says, even if the lock file goes back to what
    # it was.
    with contextlib.suppress(FileNotFoundError):
        stamp.unlink()
    started = time.time()
    say(
        "making {} with {}".format(
            folder.relative_to(ROOT) / ".venv", python or "a Python 3.12 that uv downloads"
        )
    )
    command += ["--python", python or PYTHON]
    # An environment that was made when opencv-python was locked too would lose the files that
    # both unpack.
    command += ["--reinstall-package", "opencv-python-headless"]
    if subprocess.run(command, env=env).returncode:
        raise SetupError(
            f"uv could not make {folder.relative_to(ROOT)}/.venv; see its words above. Where no "
            f"Python {PYTHON} is on the PATH, uv downloads one: where it may not, install Python "
            f"{PYTHON}."
        )
    stamp.write_text(stamp_text)
    say("made {} in {:.0f} s".format(folder.relative_to(ROOT) / ".venv", time.time() - started))


# Vulkan


def renders(device):
    """Whether SAPIEN, in the Python environment that was just made, can render on cuda or cpu."""
    code = f"import sapien; sapien.render.RenderSystem(sapien.Device({device!r}))"
    command = [str(ROOT / ".venv/bin/python"), "-c", code]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    try:
        return (
            subprocess.run(
                command, env={**os.environ, **unpacked_environment()}, timeout=120, **quiet
            ).returncode
            == 0
        )
    except subprocess.TimeoutExpired:
        return False


def mesa_version():
    """Return what the system says of its Mesa, such as "22.3.6-1+deb12u2", or None."""
    return output_of("dpkg-query", "-W", "-f", "${Version}", "mesa-vulkan-drivers") or output_of(
        "rpm", "-q", "--qf", "%{VERSION}", "mesa-vulkan-drivers"
    )


def parse_os_release(text):
    """Return (ID, VERSION_ID) of an operating system, such as ("debian", "12")."""
    values = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', text, re.MULTILINE))
    return values.get("ID", ""), values.get("VERSION_ID", "")


def debian_source(text):
    """Return Debian 12's own entry in a source file of apt, with its backports added, or None.

    Takes the content of a .sources (deb822) or .list (one-line) file. Other distributors call
    their suites bookworm too; Debian's own mirror has "debian" in its address and a component
    "main". Where packages come from, and the key that signs them, stay as they are.
    """
    for stanza in re.split(r"\n\s*\n", text):
        fields = {
            key: value.split()
            for key, value in re.findall(r"^([A-Z][\w-]*):(.*)$", stanza, re.MULTILINE)
        }
        is_debian = "debian" in "".join(fields.get("URIs", [])) and "main" in fields.get(
            "Components", []
        )
        if (
            is_debian
            and "deb" in fields.get("Types", [])
            and "bookworm" in fields.get("Suites", [])
        ):
            kept = re.sub(r"^Types:.*$", "Types: deb", stanza, flags=re.MULTILINE)
            return (
                re.sub(
                    r"^Suites:.*$", "Suites: bookworm bookworm-backports", kept, flags=re.MULTILINE
                ).strip()
                + "\n"
            )
    for line in text.splitlines():
        found = re.match(
            r"(deb\s+(?:\[[^\]]*\]\s+)?\S*debian\S*\s+bookworm)(\s.*\bmain\b.*)$", line.strip()
        )
        if found:
            return "{0}{1}\n{0}-backports{1}\n".format(*found.groups())
    return None


def find_debian_source():
    """Return (file ending, content) of this machine's Debian source with its backports, or None."""
    folder = "/etc/apt/sources.list.d/"
    for path in [
        *sorted(glob.glob(folder + "*.sources")),
        "/etc/apt/sources.list",
        *sorted(glob.glob(folder + "*.list")),
    ]:
        if os.path.isfile(path):
            content = debian_source(Path(path).read_text())
            if content:
                return Path(path).suffix, content
    return None


def run_apt(*arguments, cwd=None):
    """Run apt-get without questions; return what it printed.

    Raises:
        subprocess.CalledProcessError: if it failed; its error messages are on the terminal.
    """
    command = ["apt-get", "-qq", "-y", "-o", "Dpkg::Use-Pty=0", *arguments]
    env = dict(os.environ, DEBIAN_FRONTEND="noninteractive", LC_ALL="C")
    return subprocess.run(
        command, env=env, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def apt_state(folder, system):
    """Return options that give apt-get package lists of its own in a folder.

    The machine's are neither needed nor changed. On Debian 12 they come from Debian and its
    backports alone, else from the machine's sources.
    """
    for name in ("lists/partial", "cache/archives/partial", "sources"):
        (folder / name).mkdir(parents=True)
    values = {
        "Dir::State::lists": folder / "lists",
        "Dir::Cache": folder / "cache",
        "APT::Sandbox::User": "root",
    }
    found = find_debian_source() if system == ("debian", "12") else None
    if found:
        ending, content = found
        (folder / "sources" / ("debian" + ending)).write_text(content)
        values.update(
            {"Dir::Etc::sourcelist": "/dev/null", "Dir::Etc::sourceparts": folder / "sources"}
        )
        values["APT::Default-Release"] = "bookworm-backports"
    return [part for key, value in values.items() for part in ("-o", f"{key}={value}")]


def unpack(packages, target, options):
    """Unpack Debian packages, and what they need that is not installed, into a folder."""
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=TOOLS) as folder:
        listed = run_apt(
            *options,
            "-o",
            "Debug::NoLocking=1",
            "--no-install-recommends",
            "--print-uris",
            "install",
            *packages,
        )
        run_apt(
            *options,
            "download",
            *re.findall(r"^'[^']*' ([^_\s]+)_", listed, re.MULTILINE),
            cwd=folder,
        )
        for package in Path(folder).glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(target)], check=True)


def unpack_mesa(options):
    """Unpack Mesa and what it needs into .tools/mesa, for a user who may not install packages."""
    mesa = TOOLS / "mesa"
    unpack(MESA_PACKAGES, mesa, options)
    for driver in mesa.glob("usr/lib/*/libvulkan_lvp.so"):
        description = {
            "file_format_version": "1.0.0",
            "ICD": {"library_path": str(driver), "api_version": "1.4.0"},
        }
        (mesa / "lvp_icd.json").write_text(json.dumps(description))
        values = {"LD_LIBRARY_PATH": driver.parent, "VK_ICD_FILENAMES": mesa / "lvp_icd.json"}
        ENVIRONMENT_FILE.write_text(
            "".join(f"export {key}='{value}'\n" for key, value in values.items())
        )


def unpacked_environment():
    """Return the variables that lead to an unpacked Mesa, if there is one."""
    if not ENVIRONMENT_FILE.exists():
        return {}
    return dict(re.findall(r"^export (\w+)='(.*)'$", ENVIRONMENT_FILE.read_text(), re.MULTILINE))


def get_mesa(system):
    """Install Mesa's software renderer as root, or unpack it into .tools; say what failed."""
    TOOLS.mkdir(exist_ok=True)
    root = os.geteuid() == 0
    say(
        "{} Mesa {}, the software renderer".format(
            "installing" if root else "unpacking", MESA_MAJOR
        )
    )
    try:
        with tempfile.TemporaryDirectory(dir=TOOLS) as folder:
            options = apt_state(Path(folder), system)
            run_apt(*options, "update")
            if root:
                run_apt(*options, "--no-install-recommends", "install", *MESA_PACKAGES)
            else:
                unpack_mesa(options)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"that failed: {error}")


def advice(name, version):
    """Return a command that installs a new enough Mesa, or advice where we know none."""
    if (name, version) == ("debian", "12"):
        line = "deb http://deb.debian.org/debian bookworm-backports main"
        return (
            f"sudo sh -c \"echo '{line}' > /etc/apt/sources.list.d/backports.list; apt-get update; "
            f'apt-get install -y -t bookworm-backports {" ".join(MESA_PACKAGES)}"'
        )
    if name in ("debian", "ubuntu"):
        packages = " ".join(MESA_PACKAGES)
        return f"sudo apt-get install -y {packages} (a release that has Mesa {MESA_MAJOR})"
    if name in ("fedora", "rhel", "rocky", "almalinux"):
        return "sudo dnf install -y mesa-vulkan-drivers vulkan-loader"
    return (
        f"your system's package manager, for Mesa's Vulkan drivers (lavapipe) {MESA_MAJOR} or later"
    )


def set_up_vulkan(gpu):
    """See to it that SAPIEN can render: on the GPU, else with Mesa's software renderer.

    Rendering is tried only when the drivers that the system lists, or ours, have changed since it
    last worked.
    """
    device = "cuda" if gpu else "cpu"
    stamp = ROOT / ".venv" / ".demo2eval-renders"

    def drivers():
        listed = sorted(
            glob.glob("/usr/share/vulkan/icd.d/*.json") + glob.glob("/etc/vulkan/icd.d/*.json")
        )
        return " ".join([device, mesa_version() or "", *listed, *unpacked_environment().values()])

    if stamp.exists() and stamp.read_text() == drivers():
        return
    works = renders(device)
    if not works and gpu:
        raise SetupError(
            "there is a GPU but its driver does not render; install the Vulkan loader (sudo "
            "apt-get install -y libvulkan1), in a container set NVIDIA_DRIVER_CAPABILITIES=all, or "
            f"let the CPU render: {BACKEND_VARIABLE}=cpu make setup."
        )
    release = Path("/etc/os-release")
    system = parse_os_release(release.read_text()) if release.exists() else ("", "")
    if not works and shutil.which("apt-get"):
        get_mesa(system)
        works = renders(device)
    if not works:
        raise SetupError(
            f"ManiSkill cannot render with Mesa {mesa_version() or '(missing)'}; run: "
            f"{advice(*system)}"
        )
    stamp.write_text(drivers())
    if unpacked_environment():
        say(f"to run a stage by hand, type first: . {ENVIRONMENT_FILE.relative_to(ROOT)}")


# SLURM


def get_slurm():
    """Unpack SLURM into .tools/slurm for the tests, which start it; say what failed.

    It is not installed: a SLURM without a cluster would slow down every Snakemake of this machine.
    """
    slurm = TOOLS / "slurm"
    if slurm.exists():
        return
    TOOLS.mkdir(exist_ok=True)
    say("unpacking SLURM, for the tests")
    try:
        with tempfile.TemporaryDirectory(dir=TOOLS) as folder:
            options = apt_state(Path(folder), None)
            run_apt(*options, "update")
            unpack(SLURM_PACKAGES, Path(folder) / "slurm", options)
            (Path(folder) / "slurm").rename(slurm)
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"that failed, and its tests will be skipped: {error}")


def main():
    """Set the machine up, or say in one sentence what keeps it from that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slurm", action="store_true", help="also get SLURM for its tests")
    arguments = parser.parse_args()
    try:
        uv = get_uv()
        gpu = has_nvidia_gpu()
        if arguments.slurm:
            get_slurm()
        # The login node of a cluster, which has GPUs elsewhere.
        login = bool(shutil.which("sbatch"))
        options = ["--extra", "cuda"] if gpu or login else []
        options += ["--group", "cluster"] if login or (TOOLS / "slurm").exists() else []
        sync(uv, ROOT, *options)
        sync(uv, ROOT / "envs/planning")
        if login and not gpu:
            say("whether a node renders is not tried here: srun --gpus=1 make doctor")
        else:
            set_up_vulkan(renders_on_gpu(gpu))
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
