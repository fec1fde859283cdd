"""The first minute: setup.sh on the machines that people have, and what CI runs."""

import shutil
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT

TOOLS = ('awk', 'bash', 'cat', 'chmod', 'cp', 'dirname', 'env', 'git', 'grep', 'mkdir', 'mktemp',
         'rm', 'sh', 'tail', 'tee')

# Python as another version or on a machine without some of its parts. What it runs with -c is run
# by the real one; an environment that it makes has it and a pip, and pip only writes a line.
PYTHON = """
version="{version}" parts="{parts}"
case "$1 $2" in
    --version*) echo "Python $version.0";;
    -c*ensurepip*) [ "${{parts#*ensurepip}}" != "$parts" ];;
    -c*) exec {python} -c "import sys; sys.version_info = (3, ${{version#3.}}, 0); $2";;
    '-m venv') mkdir -p "$3/bin" && cp "$0" "$3/bin/python" &&
        echo "#!$(pwd -P)/$3/bin/python" > "$3/bin/pip"; echo "$version makes $3" >> {log};;
    '-m pip') [ "$3" = --version ] && exit
        [ "$PIP_USER" = 0 ] || exit 9
        echo "$version pip $*" >> {log}
        case "$*" in *--target*)
            [ "${{parts#*uv}}" != "$parts" ] && mkdir "$6/bin" && cp {uv} "$6/bin/uv";;
        esac;;
esac
"""
# uv, which here has, or cannot download, a Python 3.13.
UV = """
echo "uv $*" >> {log}
[ -e {python} ] && mkdir -p "$5/bin" && cp {python} "$5/bin/python" &&
    echo "#!$(pwd -P)/$5/bin/python" > "$5/bin/pip"
"""
ASK_UV = 'uv venv --seed --python >=3.10,<3.14 .venv'


@pytest.fixture
def path(tmp_path):
    """Puts programs that are shell scripts on a PATH of their own; returns the environment."""
    folder = tmp_path / 'programs'

    def path(**programs):
        folder.mkdir()
        for tool in TOOLS:
            (folder / tool).symlink_to(shutil.which(tool))
        for name, script in programs.items():
            write_program(folder / name, script)
        return {**ENVIRONMENT, 'PATH': str(folder)}
    return path


def write_program(program, script):
    program.write_text(f'#!/bin/sh\n{script}\n')
    program.chmod(0o755)


@pytest.fixture
def setup(path, tmp_path):
    """Runs setup.sh in a project of its own; its result, and the lines that the programs wrote."""
    project, log = tmp_path / 'the project', tmp_path / 'log'
    project.mkdir()

    def run(pythons, *arguments, uv=None, user=1000, system='Linux x86_64', has_apt=True):
        def python(version):
            version, _, parts = version.partition(' ')
            return PYTHON.format(version=version, parts=parts or 'ensurepip', log=log,
                                 python=sys.executable, uv=tmp_path / 'uv')
        programs = {name: python(version) for name, version in pythons.items()}
        programs.update(id=f'echo {user}', uname=f'echo {system}')
        if has_apt:
            programs['apt-get'] = f'echo apt-get "$@" >> {log}'
        uvs = UV.format(log=log, python=tmp_path / 'python3.13')
        write_program(tmp_path / 'uv', uvs)
        if uv == 'has 3.13':
            write_program(tmp_path / 'python3.13', python('3.13'))
        if uv:
            programs['uv'] = uvs
        shutil.rmtree(tmp_path / 'programs', ignore_errors=True)
        environment = {**path(**programs), 'PIP_USER': '1'}
        (project / 'setup.sh').write_text((ROOT / 'setup.sh').read_text())
        log.write_text('')
        result = subprocess.run(['sh', project / 'setup.sh', *arguments], env=environment, cwd='/',
                                capture_output=True, text=True, check=False)
        return result, log.read_text().splitlines()
    run.project, run.log = project, log
    return run


def installs(version, *more):
    return f'{version} pip -m pip install -r requirements.txt' + ''.join(
        f' -r {part}/requirements.txt' for part in more)


@pytest.mark.parametrize('more', [[], ['extras'], ['tests']])
def test_setup_makes_the_environment_and_installs_what_is_asked_for(more, setup):
    result, log = setup({'python3': '3.12'}, *more)
    assert (result.returncode, result.stderr) == (0, '')
    assert log == ['3.12 makes .venv', installs('3.12', *more)]


@pytest.mark.parametrize('pythons, chosen, system', [
    ({'python3': '3.10', 'python3.13': '3.13'}, '3.10', 'Linux x86_64'),
    ({'python3': '3.14'}, '3.14', 'Linux x86_64'),
    ({'python3': '3.15', 'python3.11': '3.11', 'python3.13': '3.13'}, '3.13', 'Linux x86_64'),
    ({'python3': '3.9', 'python3.12': '3.12'}, '3.12', 'Darwin arm64'),
    ({'python3.14': '3.14', 'python3.10': '3.10'}, '3.14', 'Darwin arm64'),
    ({'python3': '3.13', 'python3.14': '3.14', 'python3.12': '3.12'}, '3.12', 'Darwin x86_64')])
def test_setup_takes_the_first_python_for_which_tensorflow_has_packages(pythons, chosen, system,
                                                                        setup):
    result, log = setup(pythons, system=system)
    assert (result.returncode, log) == (0, [f'{chosen} makes .venv', installs(chosen)])


@pytest.mark.parametrize('pythons, uv', [({}, 'has 3.13'), ({'python3': '3.15'}, 'has 3.13')])
def test_setup_asks_uv_where_no_python_fits(pythons, uv, setup):
    result, log = setup(pythons, uv=uv)
    assert (result.returncode, log) == (0, [ASK_UV, installs('3.13')])


def test_setup_takes_uv_from_pypi_if_it_is_not_there_and_does_not_leave_it(setup, tmp_path,
                                                                          monkeypatch):
    (tmp_path / 'temporary').mkdir()
    monkeypatch.setitem(ENVIRONMENT, 'TMPDIR', str(tmp_path / 'temporary'))
    write_program(tmp_path / 'python3.13', PYTHON.format(
        version='3.13', parts='', log=setup.log, python=sys.executable, uv=''))
    result, log = setup({'python3': '3.9 ensurepip, uv'})
    assert result.returncode == 0
    assert log[0].startswith('3.9 pip -m pip install --quiet --target ') and log[0].endswith(' uv')
    assert log[1:] == [ASK_UV, installs('3.13')]
    assert not list((tmp_path / 'temporary').iterdir())


@pytest.mark.parametrize('pythons, uv, found', [
    ({}, None, 'none'), ({'python3': '3.15'}, None, 'Python 3.15.0'),
    ({'python3': '3.9'}, 'has none', 'Python 3.9.0')])
def test_setup_says_which_pythons_do_what_was_found_and_what_to_do(pythons, uv, found, setup):
    result, log = setup(pythons, uv=uv)
    assert result.returncode == 1 and not (setup.project / '.venv').exists()
    assert result.stderr == (
        f'setup.sh: TensorFlow needs Python 3.10 to 3.14 (found: {found}). Install one of those '
        "from your system's packages or https://www.python.org/downloads/, then run setup.sh "
        'again\n')
    assert not any('requirements' in line for line in log)


@pytest.mark.parametrize('name', ['python3', 'python3.12'])
def test_as_root_setup_installs_debians_package_of_the_missing_module(name, setup):
    result, log = setup({name: '3.12 none'}, user=0)
    assert result.returncode == 0
    assert log == ['apt-get update', f'apt-get install -y {name}-venv', '3.12 makes .venv',
                   installs('3.12')]


@pytest.mark.parametrize('user, has_apt', [(1000, True), (0, False)])
def test_other_users_and_other_systems_are_told_what_to_install(user, has_apt, setup):
    result, log = setup({'python3': '3.12 none'}, user=user, has_apt=has_apt)
    assert (result.returncode, log) == (1, []) and not (setup.project / '.venv').exists()
    assert result.stderr == (
        "setup.sh: Python's module ensurepip is missing. Install it from your system's packages, "
        "on Debian and Ubuntu by this command: sudo sh -c 'apt-get update && apt-get install -y "
        "python3-venv', then run setup.sh again\n")


def test_an_environment_that_works_stays(setup):
    setup({'python3': '3.12'})
    (setup.project / '.venv' / 'mine').touch()
    result, log = setup({'python3': '3.13'}, 'extras')
    assert (result.returncode, log) == (0, [installs('3.12', 'extras')])
    assert (setup.project / '.venv' / 'mine').exists()


@pytest.mark.parametrize('fault', ['too new', 'moved', 'gone', 'half made'])
def test_an_environment_that_does_not_work_is_made_anew(fault, setup, tmp_path):
    setup({'python3': '3.12'})
    program = setup.project / '.venv' / 'bin' / 'python'
    if fault == 'too new':
        program.write_text(program.read_text().replace('"3.12"', '"3.15"'))
    elif fault == 'moved':
        pip = setup.project / '.venv' / 'bin' / 'pip'
        pip.write_text(pip.read_text().replace('the project', 'another folder'))
    elif fault == 'gone':
        program.unlink()
    else:
        program.with_name('pip').unlink()
    result, log = setup({'python3': '3.11'})
    assert (result.returncode, log) == (0, ['3.11 makes .venv', installs('3.11')])
    assert result.stderr == ''


def test_git_for_windows_leaves_the_lines_of_what_a_shell_reads(tmp_path):
    git = ['git', '-c', 'core.autocrlf=true', '-c', 'safe.directory=*']
    subprocess.run([*git, 'clone', '-q', ROOT, tmp_path / 'clone'], check=True)
    for name in ('setup.sh', '.ci/run'):
        assert b'\r' not in (tmp_path / 'clone' / name).read_bytes()
    assert b'\r\n' in (tmp_path / 'clone' / 'input_data.py').read_bytes()  # others it turns
    for data in (ROOT / 'MNIST_data').glob('*.gz'):
        assert (tmp_path / 'clone' / 'MNIST_data' / data.name).read_bytes() == data.read_bytes()


# CI


def run_ci(folder, command, environment):
    """.ci/run of a project whose README has this one command."""
    project = folder / 'project'
    (project / '.ci').mkdir(parents=True)
    (project / '.ci' / 'run').write_text((ROOT / '.ci' / 'run').read_text())
    (project / 'README.md').write_text(f'```sh\n{command}\n```\n')
    git = ['git', '-c', 'user.name=x', '-c', 'user.email=x@example.org']
    for arguments in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'x']):
        subprocess.run([*git, *arguments], cwd=project, check=True)
    return subprocess.run(['bash', '.ci/run'], cwd=project, env=environment, capture_output=True,
                          text=True, check=False)


@pytest.mark.parametrize('command, code', [
    ('echo "== 2 passed ==" # -m pytest', 0),
    ('echo "SKIPPED [1] x.py: no browser"; echo "== 1 passed, 1 skipped ==" # -m pytest', 1),
    ('echo "== 1 failed ==" && exit 7 # -m pytest', 7)])
def test_ci_fails_if_a_test_fails_or_is_skipped(command, code, path, tmp_path):
    result = run_ci(tmp_path, command, path(chromium='', chromedriver=''))
    assert result.returncode == code
    assert result.stdout.splitlines()[-1].startswith('== ')
    assert ('tests were skipped' in result.stderr) == (code == 1)


def test_ci_installs_chromium_or_says_that_it_cannot(path, tmp_path):
    environment = path(**{'apt-get': 'echo "$@"; [ "$1" = update ]', 'sudo': '"$@"'})
    result = run_ci(tmp_path, 'echo "== 2 passed ==" # -m pytest', environment)
    assert result.returncode == 1
    assert 'install -y --no-install-recommends chromium chromium-driver' in result.stdout
    assert 'cannot install chromium and chromium-driver' in result.stderr


def test_ci_runs_the_readmes_test_command():
    result = subprocess.run(['bash', '.ci/run', '--print'], cwd=ROOT, capture_output=True,
                            text=True, check=False)
    assert result.returncode == 0
    assert f'```sh\n{result.stdout}```\n' in (ROOT / 'README.md').read_text()
    assert 'pytest' in result.stdout
