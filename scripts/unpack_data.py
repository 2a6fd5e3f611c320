"""Check a zip archive and unpack the folders recall/, milvus/ and sort/ in it.

    python scripts/unpack_data.py literature_search_data.zip .
"""

import os
import shutil
import sys
import zipfile

FOLDERS = ("recall", "milvus", "sort")


def unpack(archive: str, target: str) -> list[str]:
    """Unpack <any folder>/<one of FOLDERS>/<name> to target/<folder>/<name>.

    Returns:
        The paths of the files written.

    Raises:
        zipfile.BadZipFile: it is not a zip archive, or a damaged one; nothing has been written.
    """
    written = []
    with zipfile.ZipFile(archive) as bundle:
        damaged = bundle.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} is damaged")
        for member in bundle.infolist():
            # Only the last two parts of a name are used: nothing in an archive can point outside `target`.
            folder, _, name = member.filename.rpartition("/")
            folder = folder.rpartition("/")[2]
            is_file = not member.is_dir() and name not in ("", ".", "..")
            if not is_file or folder not in FOLDERS or name.startswith("._"):  # ._x is macOS' record of a file x
                continue
            path = os.path.join(target, folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with bundle.open(member) as source, open(path + ".tmp", "wb") as file:
                shutil.copyfileobj(source, file)
            os.replace(path + ".tmp", path)
            written.append(path)
    return written


def main() -> None:
    archive, target = sys.argv[1:]
    try:
        written = unpack(archive, target)
    except zipfile.BadZipFile as error:
        os.replace(archive, archive + ".bad")
        sys.exit(f"{archive}: not a complete zip archive ({error}); it was renamed to {archive}.bad: "
                 "run download_data.sh again")
    if not written:
        sys.exit(f"{archive}: has none of the folders {', '.join(FOLDERS)}")
    print("\n".join(written))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
