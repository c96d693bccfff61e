"""Prints the names of a rank's network interfaces."""

import os
import socket


def main() -> None:
    names = " ".join(sorted(name for _, name in socket.if_nameindex()))
    print(f"[rank {os.environ['RANK']} has {names}]", flush=True)  # in one piece: all ranks write to one pipe
