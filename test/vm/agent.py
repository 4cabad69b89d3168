# SPDX-License-Identifier: Apache-2.0
"""Process 1 of a test guest: runs one command per TCP connection.

A connection begins with the command (u32 length, then text for `bash -c`).
Afterwards frames of one type byte, a u32 length and a payload go both ways:

  guest to host   b'o' standard output   b'e' standard error
                  b'x' exit code (i32; 128 + N for signal N), the last frame
  host to guest   b'i' standard input (length 0 closes it)
                  b's' signal number (u8), sent to the command's process group

A connection that drops kills the whole process group: a test that died leaves
no command behind. A command that ended normally may leave processes running.
Integers are big-endian. Only cheap modules are imported: under TCG each costs.
"""

import os
import select
import signal
import socket
import struct
import sys

FRAME = struct.Struct(">cI")


def read_exactly(connection, length):
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def send(connection, kind, payload):
    connection.sendall(FRAME.pack(kind, len(payload)) + payload)


def spawn(command):
    """Starts the command in a session of its own; returns pid and our pipe ends."""
    stdin_r, stdin_w = os.pipe()
    stdout_r, stdout_w = os.pipe()
    stderr_r, stderr_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        for source, target in ((stdin_r, 0), (stdout_w, 1), (stderr_w, 2)):
            os.dup2(source, target)
        os.closerange(3, 64)
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.execv("/bin/bash", ["bash", "-c", command])
    for end in (stdin_r, stdout_w, stderr_w):
        os.close(end)
    return pid, stdin_w, stdout_r, stderr_r


def drain(connection, outputs, poller):
    """Sends what a finished command left in its pipes, without waiting for more."""
    while outputs:
        ready = [fd for fd, _ in poller.poll(0) if fd in outputs]
        if not ready:
            return
        for fd in ready:
            data = os.read(fd, 65536)
            if data:
                send(connection, outputs[fd], data)
            else:
                poller.unregister(fd)
                del outputs[fd]


def serve(connection):
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    (length,) = struct.unpack(">I", read_exactly(connection, 4))
    pid, stdin, stdout, stderr = spawn(read_exactly(connection, length))
    finished = os.pidfd_open(pid)
    outputs = {stdout: b"o", stderr: b"e"}
    poller = select.poll()
    for fd in (connection.fileno(), finished, stdout, stderr):
        poller.register(fd, select.POLLIN)
    try:
        while True:
            for fd, _ in poller.poll():
                if fd in outputs:
                    data = os.read(fd, 65536)
                    if data:
                        send(connection, outputs[fd], data)
                    else:
                        poller.unregister(fd)
                        del outputs[fd]
                elif fd == connection.fileno():
                    kind, size = FRAME.unpack(read_exactly(connection, FRAME.size))
                    payload = read_exactly(connection, size)
                    if kind == b"s":
                        os.killpg(pid, payload[0])
                    elif kind == b"i" and size:
                        try:
                            os.write(stdin, payload)
                        except BrokenPipeError:
                            pass
                    elif kind == b"i" and stdin >= 0:
                        os.close(stdin)
                        stdin = -1
                else:
                    drain(connection, outputs, poller)
                    _, status = os.waitpid(pid, 0)
                    code = os.waitstatus_to_exitcode(status)
                    send(connection, b"x", struct.pack(">i", code if code >= 0 else 128 - code))
                    connection.shutdown(socket.SHUT_WR)
                    return
    except (EOFError, OSError):
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def main():
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", int(sys.argv[1])))
    listener.listen(64)
    # As process 1 it inherits every orphan: the kernel reaps them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"stillblock-agent: ready\n")
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            serve(connection)
            os._exit(0)
        connection.close()


main()
