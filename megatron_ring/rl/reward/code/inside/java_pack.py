"""Packs compiled Java classes into a jar whose manifest names the main class. Read as text, run in the sandbox.

    pack.py FOLDER JAR PREFERRED

The main class has ``public static void main(String[])``, by its class file. Of several, PREFERRED comes first (the class
that the source file is named after), then one called Main or Solution, a public one, a top-level one, the first by name.
"""

import os
import struct
import sys
import zipfile

PUBLIC, STATIC = 0x0001, 0x0008
SIZES = {
    3: 4,
    4: 4,
    5: 8,
    6: 8,
    7: 2,
    8: 2,
    9: 4,
    10: 4,
    11: 4,
    12: 4,
    15: 3,
    16: 2,
    17: 4,
    18: 4,
    19: 2,
    20: 2,
}


def read_class(data):
    """(name with points, access flags, whether it has a main method) of a class file."""
    count = struct.unpack_from(">H", data, 8)[0]
    texts, classes = {}, {}
    at, index = 10, 1
    while index < count:
        tag = data[at]
        if tag == 1:
            length = struct.unpack_from(">H", data, at + 1)[0]
            texts[index] = data[at + 3 : at + 3 + length]
            at += 3 + length
        else:
            if tag == 7:
                classes[index] = struct.unpack_from(">H", data, at + 1)[0]
            at += 1 + SIZES[tag]
        index += 2 if tag in (5, 6) else 1
    access, this, _, interfaces = struct.unpack_from(">HHHH", data, at)
    at += 8 + 2 * interfaces
    has_main = False
    for part in ("fields", "methods"):
        members = struct.unpack_from(">H", data, at)[0]
        at += 2
        for _ in range(members):
            flags, name, kind, attributes = struct.unpack_from(">HHHH", data, at)
            at += 8
            for _ in range(attributes):
                at += 6 + struct.unpack_from(">I", data, at + 2)[0]
            signature = (texts[name], texts[kind]) == (b"main", b"([Ljava/lang/String;)V")
            has_main |= part == "methods" and signature and flags & (PUBLIC | STATIC) == PUBLIC | STATIC
    return texts[classes[this]].decode().replace("/", "."), access, has_main


def manifest(main_class):
    """The manifest's bytes: lines of at most 72 bytes; a longer one continues after a space."""
    line = f"Main-Class: {main_class}".encode()
    parts = [line[:70], *(b" " + line[at : at + 69] for at in range(70, len(line), 69))]
    return b"\r\n".join([b"Manifest-Version: 1.0", *parts, b"", b""])


def main(folder, jar, preferred):
    found, paths = [], []
    for where, _, names in os.walk(folder):
        for path in (os.path.join(where, name) for name in names):
            paths.append(path)
            with open(path, "rb") as file:
                name, access, has_main = read_class(file.read())
            if has_main:
                short = name.rpartition(".")[2]
                liking = [
                    short != preferred,
                    short not in ("Main", "Solution"),
                    not access & PUBLIC,
                    "$" in short,
                    name,
                ]
                found.append((*liking, name))
    if not found:
        sys.exit("no class has public static void main(String[])")
    with zipfile.ZipFile(jar, "w") as archive:
        archive.writestr("META-INF/MANIFEST.MF", manifest(min(found)[-1]))
        for path in paths:
            archive.write(path, os.path.relpath(path, folder))


main(*sys.argv[1:])
