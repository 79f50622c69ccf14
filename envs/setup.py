"""Set-up of a fresh machine: uv, the locked environments, and a Vulkan device. `make setup` runs it with any python3 from 3.9 on.

What is there already is left alone; a second run takes a second.
"""

import argparse
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
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".tools"
UV_VERSION = "0.13.9"
PYTHON = "3.12"
PYTHON_NAME = "python" + PYTHON
MESA_MAJOR = 25
MESA_PACKAGES = ["mesa-vulkan-drivers", "libvulkan1"]


class SetupError(Exception):
    """What is missing and how to get it, in one sentence."""


def say(text):
    """Print one line at once."""
    print("setup: " + text, flush=True)


def output_of(*command):
    """Return what a command prints, or None if it is missing or fails."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


# uv


def find_uv():
    """Return a uv that runs, the system's or the one that was fetched before, or None."""
    for candidate in (str(TOOLS / "uv"), shutil.which("uv")):
        if candidate and output_of(candidate, "--version"):
            return candidate
    return None


def fetch_uv_with_pip():
    """Fetch uv's wheel with pip and return its path, or None where pip is missing or fails."""
    folder = Path(tempfile.mkdtemp(dir=TOOLS))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check", "-d", str(folder)]
    try:
        subprocess.run([*command, "uv==" + UV_VERSION], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(folder.glob("*.whl"), None)


def fetch_uv_from_index():
    """Fetch uv's wheel from PyPI without pip, check its hash, and return its path."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    try:
        with urllib.request.urlopen(f"https://pypi.org/pypi/uv/{UV_VERSION}/json", timeout=60) as response:
            files = json.load(response)["urls"]
        wanted = [item for item in files if "manylinux" in item["filename"] and machine in item["filename"]]
        with urllib.request.urlopen(wanted[0]["url"], timeout=300) as response:
            content = response.read()
    except (OSError, IndexError, ValueError) as error:
        raise SetupError(
            f"uv could not be fetched ({error}); install it as https://docs.astral.sh/uv says, and run `make setup` again."
        ) from None
    if hashlib.sha256(content).hexdigest() != wanted[0]["digests"]["sha256"]:
        raise SetupError("uv was fetched damaged; run `make setup` again.")
    path = TOOLS / wanted[0]["filename"]
    path.write_bytes(content)
    return path


def get_uv():
    """Return the path of uv, fetching it into .tools if it is missing."""
    uv = find_uv()
    if uv:
        return uv
    say(f"fetching uv {UV_VERSION}")
    TOOLS.mkdir(exist_ok=True)
    wheel = fetch_uv_with_pip() or fetch_uv_from_index()
    with zipfile.ZipFile(wheel) as archive:
        name = next(item for item in archive.namelist() if item.endswith("/scripts/uv"))
        (TOOLS / "uv").write_bytes(archive.read(name))
    (TOOLS / "uv").chmod(0o755)
    if not find_uv():
        raise SetupError("the uv that was fetched does not run on this machine; install it as https://docs.astral.sh/uv says.")
    return str(TOOLS / "uv")


# Python


def python_candidates():
    """Yield places where a Python 3.12 may be."""
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield os.path.join(folder, PYTHON_NAME)
    for pattern in (f"~/.pyenv/versions/{PYTHON}*/bin", f"/opt/python{PYTHON}*/bin", "/usr/local/bin"):
        yield from sorted(glob.glob(os.path.join(os.path.expanduser(pattern), PYTHON_NAME)), reverse=True)


def find_python():
    """Return a Python 3.12 that runs and says that it is one, by its real path: a shim would mislead uv. None if there is none."""
    for candidate in python_candidates():
        if os.path.isfile(candidate):
            said = output_of(candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2], sys.executable)")
            if said and said.startswith(PYTHON + " "):
                return said.split(" ", 1)[1].strip()
    return None


# Environments


def has_nvidia_gpu():
    """Whether an NVIDIA driver answers."""
    return bool(output_of("nvidia-smi", "-L"))


def sync(uv, folder, *options):
    """Make the environment folder/.venv as folder/uv.lock says, unless that was done already."""
    content = b"".join((folder / name).read_bytes() for name in ("uv.lock", "pyproject.toml"))
    stamp_text = hashlib.sha256(content + repr(options).encode()).hexdigest()
    stamp = folder / ".venv" / ".demo2eval-stamp"
    if stamp.exists() and stamp.read_text() == stamp_text and (folder / ".venv/bin/python").exists():
        return
    python = find_python()
    started = time.time()
    say("making {} with {}".format(folder.relative_to(ROOT) / ".venv", python or "a Python 3.12 that uv downloads"))
    command = [uv, "sync", "--locked", "--quiet", "--project", str(folder), "--python", python or PYTHON]
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT")}
    if subprocess.run([*command, *options], env=environment).returncode:
        raise SetupError(
            f"uv could not make {folder.relative_to(ROOT)}/.venv; see its words above. Where no Python {PYTHON} is on the PATH, uv "
            f"downloads one: where it may not, install Python {PYTHON}."
        )
    stamp.write_text(stamp_text)
    say("made {} in {:.0f} s".format(folder.relative_to(ROOT) / ".venv", time.time() - started))


# Vulkan


def lavapipe_version(text):
    """Return the major version of Mesa from the name of its package or driver, or None."""
    found = re.search(r"(\d+)\.\d+", text or "")
    return int(found.group(1)) if found else None


def installed_mesa():
    """Return the major version of the installed Mesa's software Vulkan driver, or None."""
    if not glob.glob("/usr/share/vulkan/icd.d/lvp_icd*.json"):
        return None
    said = output_of("dpkg-query", "-W", "-f", "${Version}", "mesa-vulkan-drivers")
    if said is None:
        said = output_of("rpm", "-q", "--qf", "%{VERSION}", "mesa-vulkan-drivers")
    return lavapipe_version(said)


def system():
    """Return (ID, VERSION_ID) of the operating system, such as ("debian", "12")."""
    try:
        text = Path("/etc/os-release").read_text()
    except OSError:
        return "", ""
    values = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', text, re.MULTILINE))
    return values.get("ID", ""), values.get("VERSION_ID", "")


def backports_source(text):
    """Return the backports entry for Debian 12, made from a machine's own Debian source with its suite changed.

    Takes the content of a .sources (deb822) or .list (one-line) file; returns None if it holds no source of Debian 12 itself.
    """
    for stanza in re.split(r"\n\s*\n", text):
        suites = re.search(r"^Suites:(.*)$", stanza, re.MULTILINE)
        if suites and "bookworm" in suites.group(1).split() and re.search(r"^Types:.*\bdeb\b", stanza, re.MULTILINE):
            return re.sub(r"^Suites:.*$", "Suites: bookworm-backports", stanza, flags=re.MULTILINE).strip() + "\n"
    for line in text.splitlines():
        found = re.match(r"^(deb\s+(?:\[[^\]]*\]\s+)?\S+\s+)bookworm(\s.*)$", line.strip())
        if found:
            return found.group(1) + "bookworm-backports" + found.group(2) + "\n"
    return None


def find_backports_source():
    """Return (file ending, content) of a backports source for this machine, or None."""
    folder = "/etc/apt/sources.list.d/"
    for path in [*sorted(glob.glob(folder + "*.sources")), "/etc/apt/sources.list", *sorted(glob.glob(folder + "*.list"))]:
        if os.path.isfile(path):
            content = backports_source(Path(path).read_text())
            if content:
                return (".sources" if path.endswith(".sources") else ".list"), content
    return None


def apt(*arguments):
    """Run apt-get without questions; return whether it succeeded."""
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    command = ["apt-get", "-qq", "-y", "-o", "Dpkg::Use-Pty=0", *arguments]
    return subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 0


def install_from_backports():
    """Install Mesa from Debian 12's backports through a source that exists only meanwhile; return whether it succeeded."""
    found = find_backports_source()
    if not found:
        return False
    ending, content = found
    source = Path("/etc/apt/sources.list.d/demo2eval-backports" + ending)
    source.write_text(content)
    try:
        return apt("update") and apt("install", "-t", "bookworm-backports", "--no-install-recommends", *MESA_PACKAGES)
    finally:
        source.unlink()


def advice(name, version):
    """Return the command that installs a new enough Mesa."""
    if (name, version) == ("debian", "12"):
        line = "deb http://deb.debian.org/debian bookworm-backports main"
        return (
            f"sudo sh -c \"echo '{line}' > /etc/apt/sources.list.d/backports.list; apt-get update; "
            f'apt-get install -y -t bookworm-backports {" ".join(MESA_PACKAGES)}"'
        )
    if name in ("debian", "ubuntu"):
        return "sudo apt-get install -y " + " ".join(MESA_PACKAGES)
    if name in ("fedora", "rhel", "rocky", "almalinux"):
        return "sudo dnf install -y mesa-vulkan-drivers vulkan-loader"
    return f"your system's package manager: Mesa's Vulkan drivers (lavapipe), version {MESA_MAJOR} or later"


def set_up_vulkan():
    """See to it that a Vulkan device exists: the GPU driver's, or Mesa's software renderer."""
    if has_nvidia_gpu():
        if not output_of("sh", "-c", "ldconfig -p | grep libvulkan.so.1"):
            raise SetupError("the GPU's driver needs the Vulkan loader; install it: sudo apt-get install -y libvulkan1.")
        return
    mesa = installed_mesa()
    if mesa is not None and mesa >= MESA_MAJOR:
        return
    name, version = system()
    can_install = hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("apt-get")
    if can_install and name in ("debian", "ubuntu"):
        say(f"installing Mesa {MESA_MAJOR}, the software renderer, since there is no GPU")
        if (name, version) == ("debian", "12"):
            install_from_backports()
        else:
            apt("update")
            apt("install", "--no-install-recommends", *MESA_PACKAGES)
        mesa = installed_mesa()
    if mesa is None or mesa < MESA_MAJOR:
        have = f"there is Mesa {mesa}" if mesa else "there is no Vulkan driver"
        raise SetupError(f"the simulator needs Mesa {MESA_MAJOR} or later, and {have}; run: {advice(name, version)}")


def main():
    """Set the machine up, or say in one sentence what keeps it from that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    try:
        uv = get_uv()
        sync(uv, ROOT, *(["--extra", "cuda"] if has_nvidia_gpu() else []))
        sync(uv, ROOT / "envs/planning")
        set_up_vulkan()
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
