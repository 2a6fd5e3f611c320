#!/bin/sh
# Fetch literature_search_data.zip (the original's data), check it, unpack it: recall/, milvus/ and sort/ appear here.
# A broken download is resumed by running the script again.
#   DATA_URL  address of the archive
cd "$(dirname "$0")/.." || exit 1
. scripts/common.sh
url=${DATA_URL:-https://bj.bcebos.com/v1/paddlenlp/data/literature_search_data.zip}
archive=literature_search_data.zip

fetch() { # resumes what is there
    if command -v curl >/dev/null 2>&1; then
        curl --fail --location --connect-timeout 20 --retry 3 --continue-at - --output "$archive.part" "$url"
    elif command -v wget >/dev/null 2>&1; then
        wget --continue --timeout=20 --tries=3 --output-document="$archive.part" "$url"
    else
        echo "download_data.sh: neither curl nor wget is installed" >&2
        return 1
    fi
}

if [ ! -f "$archive" ]; then
    fetch || {
        echo "download_data.sh: $url could not be fetched. Run the script again to resume. Without a network: fetch the" \
            "file elsewhere, put it here as $archive and run the script again; or try the application on generated data:" \
            "bash scripts/quickstart.sh" >&2
        exit 1
    }
    mv "$archive.part" "$archive"
fi
exec "$PYTHON" scripts/unpack_data.py "$archive" .
