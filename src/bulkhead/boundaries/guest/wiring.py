"""The steps that set up a guest's network interfaces: ioctls, whose errors are errors of the step.

netdevice(7), and the kernel's linux/route.h and linux/ipv6_route.h for the structures.
"""

import errno
import socket
import struct
from collections.abc import Mapping
from ipaddress import (
    IPv4Interface,
    IPv4Network,
    IPv6Interface,
    IPv6Network,
    ip_interface,
    ip_network,
)

from bulkhead.boundary.seam import Nic
from bulkhead.linux.mounts import AT_FDCWD
from bulkhead.linux.program import Blob, Patched, Program, Slot

SIOCADDRT = 0x890B
SIOCDELRT = 0x890C
SIOCSIFFLAGS = 0x8914
SIOCSIFADDR = 0x8916
SIOCSIFNETMASK = 0x891C
SIOCSIFMTU = 0x8922
SIOCSIFNAME = 0x8923
SIOCSIFHWADDR = 0x8924
SIOCGIFINDEX = 0x8933
_IFF_UP_RUNNING = 0x41
_ARPHRD_ETHER = 1
_RTF_UP, _RTF_GATEWAY, _RTF_HOST = 1, 2, 4
_NAME = 16
_IFREQ = 40
_NO_IPV6 = (errno.EAFNOSUPPORT,)


def plan_loopback(program: Program) -> None:
    """Bring up lo."""
    inet = _socket(program, socket.AF_INET)
    _up(program, inet, "lo")
    program.call("close", "close", inet)


def plan_interface(program: Program, nic: Nic, kernel_name: str) -> None:
    """Name, address and route interface `kernel_name` as `nic` says, and bring it up."""
    name = nic.name
    inet = _socket(program, socket.AF_INET)
    if kernel_name != name:
        step = f"name interface {kernel_name} {name}"
        program.call(step, "ioctl", inet, SIOCSIFNAME, _ifreq(kernel_name, _label(name)))
    if nic.mac:
        address = struct.pack("=H", _ARPHRD_ETHER) + bytes.fromhex(nic.mac.replace(":", ""))
        program.call(f"address of {name}", "ioctl", inet, SIOCSIFHWADDR, _ifreq(name, address))
    if nic.mtu:
        mtu = struct.pack("=i", nic.mtu)
        program.call(f"MTU of {name}", "ioctl", inet, SIOCSIFMTU, _ifreq(name, mtu))
    parsed = [ip_interface(text) for text in nic.addresses]
    _plan_addresses_v4(program, inet, name, [a for a in parsed if isinstance(a, IPv4Interface)])
    # The addresses are given, and nobody else has them.
    path = f"/proc/sys/net/ipv6/conf/{name}/accept_dad"
    program.write(f"no detection on {name}", AT_FDCWD, path, "0", ok=(errno.ENOENT,))
    _up(program, inet, name)
    routes = [(_network(destination), gateway) for destination, gateway in nic.routes]
    _plan_v6(
        program,
        inet,
        name,
        [a for a in parsed if isinstance(a, IPv6Interface)],
        [(n, g) for n, g in routes if isinstance(n, IPv6Network)],
    )
    for network, gateway in routes:
        if isinstance(network, IPv4Network):
            _plan_route_v4(program, inet, name, network, gateway)
    program.call("close", "close", inet)


def plan_default(program: Program, gateways: Mapping[int, tuple[str, str]]) -> None:
    """Let the default routes be these (by IP version: interface, gateway), and no others."""
    inet = _socket(program, socket.AF_INET)
    head = bytes(8) + _sockaddr(bytes(4)) + bytes(16) + _sockaddr(bytes(4))
    nothing = (head + struct.pack("=H", _RTF_UP)).ljust(120, b"\0")
    gone = (errno.ESRCH,)
    for _ in range(2):
        program.call("forget the default route", "ioctl", inet, SIOCDELRT, Blob(nothing), ok=gone)
    if 4 in gateways:
        name, gateway = gateways[4]
        _plan_route_v4(program, inet, name, IPv4Network("0.0.0.0/0"), gateway)
    program.call("close", "close", inet)
    if 6 in gateways:
        name, gateway = gateways[6]
        inet6 = _socket(program, socket.AF_INET6, ok=_NO_IPV6)
        with program.when(inet6):
            empty = bytes(48) + struct.pack("=IHHIxxxxQIi", 0, 0, 0, 0, 0, 0, 0)
            program.call("forget it", "ioctl", inet6, SIOCDELRT, Blob(empty), ok=gone)
            program.call("close", "close", inet6)
        _plan_v6(program, inet, name, [], [(IPv6Network("::/0"), gateway)])


def plan_empty(program: Program, name: str, address: str, resolver: str) -> None:
    """Leave interface `name` nothing but `address`, from which our resolver is asked.

    It stays up: user-mode-linux lets go of a tap for ever when its card is taken down.
    """
    inet = _socket(program, socket.AF_INET)
    nothing = _ifreq(name, _sockaddr(bytes(4)))
    program.call(f"no address of {name}", "ioctl", inet, SIOCSIFADDR, nothing)
    one = ip_interface(address)
    assert isinstance(one, IPv4Interface)
    _plan_addresses_v4(program, inet, name, [one])
    _plan_route_v4(program, inet, name, IPv4Network(f"{resolver}/32"), "")
    program.call("close", "close", inet)


def plan_down(program: Program, name: str) -> None:
    """Take interface `name` down, and with it its routes."""
    inet = _socket(program, socket.AF_INET)
    program.call(f"take down {name}", "ioctl", inet, SIOCSIFFLAGS, _ifreq(name, bytes(2)))
    program.call("close", "close", inet)


def _network(destination: str) -> IPv4Network | IPv6Network:
    return ip_network("0.0.0.0/0" if destination == "default" else destination)


def _socket(program: Program, family: int, ok: tuple[int, ...] = ()) -> Slot:
    flags = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    return program.call("open a socket", "socket", int(family), int(flags), 0, ok=ok)


def _label(name: str) -> bytes:
    raw = name.encode()
    if not 0 < len(raw) < _NAME:
        raise ValueError(f"{name!r} is not an interface's name")
    return raw.ljust(_NAME, b"\0")


def _ifreq(name: str, value: bytes) -> bytes:
    return (_label(name) + value).ljust(_IFREQ, b"\0")


def _sockaddr(address: bytes) -> bytes:
    return struct.pack("=HH", socket.AF_INET, 0) + address + bytes(8)


def _up(program: Program, inet: Slot, name: str) -> None:
    flags = struct.pack("=h", _IFF_UP_RUNNING)
    program.call(f"bring up {name}", "ioctl", inet, SIOCSIFFLAGS, _ifreq(name, flags))


def _plan_addresses_v4(
    program: Program, inet: Slot, name: str, addresses: list[IPv4Interface]
) -> None:
    for number, one in enumerate(addresses):
        label = f"{name}:{number}" if number else name
        step = f"address {one} of {name}"
        data = _ifreq(label, _sockaddr(one.ip.packed))
        program.call(step, "ioctl", inet, SIOCSIFADDR, data)
        data = _ifreq(label, _sockaddr(one.netmask.packed))
        program.call(step, "ioctl", inet, SIOCSIFNETMASK, data)


def _plan_route_v4(
    program: Program, inet: Slot, name: str, network: IPv4Network, gateway: str
) -> None:
    flags = _RTF_UP | (_RTF_GATEWAY if gateway else 0)
    flags |= _RTF_HOST if network.prefixlen == 32 else 0
    head = bytes(8) + _sockaddr(network.network_address.packed)
    head += _sockaddr(socket.inet_aton(gateway)) if gateway else bytes(16)
    head += _sockaddr(network.netmask.packed) + struct.pack("=H", flags)
    device = Blob(_label(name))
    entry = Patched(head.ljust(120, b"\0"), ((88, 8, device),))
    step = f"route to {network}"
    program.call(step, "ioctl", inet, SIOCADDRT, entry, ok=(errno.EEXIST,))


def _plan_v6(
    program: Program,
    inet: Slot,
    name: str,
    addresses: list[IPv6Interface],
    routes: list[tuple[IPv6Network, str]],
) -> None:
    if not addresses and not routes:
        return
    request = Blob(_ifreq(name, b""))
    program.call(f"index of {name}", "ioctl", inet, SIOCGIFINDEX, request)
    index = program.load(f"index of {name}", request, _NAME, 4)
    inet6 = _socket(program, socket.AF_INET6, ok=_NO_IPV6)
    with program.when(inet6):
        for one in addresses:
            data = one.ip.packed + struct.pack("=Ii", one.network.prefixlen, 0)
            program.call(
                f"address {one} of {name}",
                "ioctl", inet6, SIOCSIFADDR, Patched(data, ((20, 4, index),)),
            )  # fmt: skip
        for network, gateway in routes:
            flags = _RTF_UP | (_RTF_GATEWAY if gateway else 0)
            data = network.network_address.packed + bytes(16)
            data += socket.inet_pton(socket.AF_INET6, gateway) if gateway else bytes(16)
            data += struct.pack("=IHHIxxxxQIi", 0, network.prefixlen, 0, 1024, 0, flags, 0)
            program.call(
                f"route to {network}",
                "ioctl", inet6, SIOCADDRT, Patched(data, ((76, 4, index),)), ok=(errno.EEXIST,),
            )  # fmt: skip
        program.call("close", "close", inet6)
