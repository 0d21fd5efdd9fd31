r"""systemd units for an archive, as text.

Rule: a path is written so that systemd reads exactly its bytes, or it is refused. Each setting has its own escapes. A
unit's name is escaped as by systemd-escape(1). A command line (systemd.service(5)) has quotes, C escapes and `$`. In a
list of paths a backslash only takes away the meaning of what follows. A value of a mount unit has none of these, yet
becomes a command line with `$`. All have specifiers (systemd.unit(5)), so that a `%` is doubled.

A service supervises the daemon: it shows its state, has a watchdog, and restarts it when it fails. Only a mount unit
can be mounted on first use; no service supervises its daemon.
"""

import itertools
import os
import re
from collections.abc import Iterable, Sequence

from tartapefs.base.text import printable

_NAME_MAX = 255  # bytes of a unit's name
_PLAIN = re.compile(r"[\w@+=:,./-]+", re.ASCII)  # needs no quotes in any setting

_SERVICE = """\
[Unit]
Description=The archive of {title}, mounted
Documentation=man:tartapefs(1)
RequiresMountsFor={sources}
StartLimitIntervalSec=5min
StartLimitBurst=10

[Service]
# Started once the archive can be read; nothing is recorded here. "systemctl status" says whether the folder is as
# recorded, or what is not. Then the mount stays, and reads fail: an empty folder could be taken for a deletion.
Type=notify
{settings}# Fails where a daemon that was killed has left its mount behind. The next line heals that.
ExecStartPre=-mkdir -p -- {where}
ExecStart={command}
# After a crash, after two minutes without an answer, and when it could not be mounted. Not after exit codes 1 (no
# longer as recorded), 2 (wrong usage), 3 (no tape) and 4 (refused).
Restart=on-failure
RestartSec=1
RestartPreventExitStatus=1 2 3 4
WatchdogSec=2min
# The daemon unmounts when it is told to end, by a program that must not be told so too.
KillMode=mixed
TimeoutStopSec=30
{sandbox}
[Install]
WantedBy={target}
"""

_SANDBOX = """\

# What makes a mount namespace, such as PrivateTmp=, Protect...= or ReadOnlyPaths=, would hide the mount from everybody
# else. What follows does not.
NoNewPrivileges=yes
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_DAC_READ_SEARCH
DevicePolicy=closed
DeviceAllow=/dev/fuse rw
IPAddressDeny=any
KeyringMode=private
LockPersonality=yes
MemoryDenyWriteExecute=yes
RestrictAddressFamilies=AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service @mount
SystemCallErrorNumber=EPERM
"""

_USER_SANDBOX = """\

# fusermount3 is setuid: an option that implies NoNewPrivileges=, as nearly all do for a user, would take that away.
"""

_MOUNT = """\
[Unit]
Description=The archive of {title}, mounted
Documentation=man:mount.tartapefs(8)
RequiresMountsFor={sources}

[Mount]
What={source}
Where={where}
Type=fuse.tartapefs
Options={options}
"""

_AUTOMOUNT = """\
[Unit]
Description=The archive of {title}, mounted on first use

[Automount]
Where={where}
TimeoutIdleSec=10min

[Install]
WantedBy=multi-user.target
"""


def escaped(path: str) -> str:
    r"""Escapes an absolute, normal path for a unit's name, as `systemd-escape --path` does.

    >>> escaped("/mnt/my tape-1"), escaped("/"), escaped("/.hidden")
    ('mnt-my\\x20tape\\x2d1', '-', '\\x2ehidden')
    """
    name = path.strip("/")
    if not name:
        return "-"
    escaped_name = re.sub(rb"[^\w:./]", lambda match: b"\\x%02x" % match[0][0], os.fsencode(name), flags=re.ASCII)
    return re.sub(r"^\.", r"\\x2e", escaped_name.decode()).replace("/", "-")


def service(program: Iterable[str], source: str, where: str, options: Sequence[str], user: bool) -> dict[str, str]:
    """The unit, by its name, that keeps the archive of `source` mounted at `where`; both are absolute, normal paths.

    `program`: how to run tartapefs; `options`: of `tartapefs mount`; `user`: for `systemctl --user`. Raises ValueError
    for a path that no unit can express.
    """
    _check(source, where, *options)
    command = " ".join(map(_word, [*program, "mount", "--foreground", *options, "--", source, where]))
    text = _service(_percent(printable(source)), _path_list(source), command, _word(where), "", user)
    return {_named(f"tartapefs-{escaped(where)}.service"): text}


def template(user: bool) -> dict[str, str]:
    """The template service, whose instances are named after the escaped path of their source.

    It does not suit a source with `${` or `$$` in its path: systemd would expand a variable.
    """
    where = "%t/tape/%i" if user else "/mnt/%i"
    settings = '# Changed by "systemctl edit"; OPTIONS are those that "tartapefs help mount" lists.\n'
    settings += f"Environment=MOUNTPOINT={where} OPTIONS=\n"
    command = "tartapefs mount --foreground $OPTIONS -- %f ${MOUNTPOINT}"
    return {"tartapefs@.service": _service("%f", "%f", command, "${MOUNTPOINT}", settings, user)}


def _service(title: str, sources: str, command: str, where: str, settings: str, user: bool) -> str:
    return _SERVICE.format(
        title=title,
        sources=sources,
        settings=settings,
        where=where,
        command=command,
        sandbox=_USER_SANDBOX if user else _SANDBOX,
        target="default.target" if user else "multi-user.target",
    )


def automount(source: str, where: str, options: str) -> dict[str, str]:
    """The pair of units, by their names, that mounts the archive of `source` at `where` on first use, by mount(8).

    Paths and errors as for `service`; `options` are mount(8)'s.
    """
    _check(source, where, options)
    if re.search(r"\$[${]", where):
        raise ValueError(f"systemd would expand the variable in {printable(where)}; leave out --automount")
    values = {
        "title": _percent(printable(source)),
        "sources": _path_list(source),
        "source": _value(source if _PLAIN.fullmatch(source) else source + "/"),
        "where": where if _PLAIN.fullmatch(where) else "%f",
        "options": _value(options),
    }
    name = escaped(where)
    return {_named(f"{name}.mount"): _MOUNT.format(**values), _named(f"{name}.automount"): _AUTOMOUNT.format(**values)}


def _check(*texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{printable(text)} is not UTF-8: systemctl could not show such a unit") from None


def _named(unit: str) -> str:
    if len(unit) > _NAME_MAX:
        raise ValueError(f"a unit's name has at most {_NAME_MAX} bytes, and this path makes {len(unit)} of them")
    return unit


def _percent(text: str) -> str:
    return text.replace("%", "%%")


def _is_shown(text: str) -> bool:
    """Whether all its characters are printable; a line end is not, for one."""
    text = text.replace("\\", "/")
    return printable(text) == text


def _word(text: str) -> str:
    """One argument of a command line."""
    if _PLAIN.fullmatch(text):
        return text
    return '"' + "".join(map(_character, text)) + '"'


def _character(character: str) -> str:
    if character in "%$":
        return character * 2
    if character in '\\"':
        return "\\" + character
    return character if _is_shown(character) else "".join(f"\\x{byte:02x}" for byte in character.encode())


def _value(text: str) -> str:
    """The value of What= or Options=, which have no escapes but those of specifiers."""
    if not _is_shown(text):
        raise ValueError(f"a mount unit cannot have {printable(text)}; a service can")
    return _percent(text).replace("$", "$$")


def _path_list(path: str) -> str:
    """A list of this one path, cut before the first component that cannot be written."""
    path = "/".join(itertools.takewhile(_is_shown, path.split("/"))) or "/"
    return path if _PLAIN.fullmatch(path) else '"' + re.sub(r'["\\]', r"\\\g<0>", _percent(path)) + '"'
