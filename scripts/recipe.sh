# Read by quickstart.sh, under bash: recall for documents without labels, as docs/en/better-recall.md has it. An encoder
# is whitened on the documents, trained on pairs that are made from them, and whitened again.
# run_recipe does that with a file of the user, builds the index and answers queries; the other functions are its parts.
ENCODER=pretrained/ernie_mini_zh
MAX_PAIRS=120000           # about as many as 2 cores train on within minutes
MAX_PAIRS_PER_DOCUMENT=20  # a small file has many of each document
MIN_WHITENING_TEXTS=500    # documents and clauses; on fewer, whitening and training do harm
PAIR_EPOCHS=2              # passes over the pairs
SHORT_LENGTH=64            # tokens, for titles and questions
QUERIES=3                  # that are taken out of the documents where none is given
TOP_K=5                    # documents printed for each query
# What run_recipe and the commands that it prints write to its folder, besides files that are always written over.
OWN_FILES="pairs.csv whitened trained index answers.tsv output result"
OWN_MARK=made_by_quickstart  # an empty file in a folder that run_recipe may clear

say() { printf '== %s\n' "$*" >&2; }

refuse() { # refuse MESSAGE: end with one line and exit code 2
    printf 'quickstart.sh: error: %s\n' "$*" >&2
    exit 2
}

# begin WHAT and finish: a step, and how long it took.
begin() {
    step=$1
    step_started=$SECONDS
    say "$step ..."
}

finish() { say "$step: $((SECONDS - step_started)) s"; }

# The settings that depend on DEVICE.
choose_recipe() {
    case $DEVICE in
    cpu)
        POOLING=first_avg   # no layers: fast without a GPU
        LONG_LENGTH=512     # tokens of long documents, which cost little without layers
        MAX_BATCH_SIZE=512  # many negatives for each query
        PAIR_LEARNING_RATE=1e-3
        ;;
    gpu)
        POOLING=first_last_avg
        LONG_LENGTH=128  # every token goes through the layers
        MAX_BATCH_SIZE=128
        PAIR_LEARNING_RATE=2e-4  # the layers are trained too, in smaller steps than a table of tokens
        ;;
    *) refuse "DEVICE=$DEVICE: expected cpu or gpu" ;;
    esac
}

# sequence_length TOKENS: --max_seq_length for texts of so many tokens.
sequence_length() {
    if [ "$1" -gt "$SHORT_LENGTH" ]; then
        echo "$LONG_LENGTH"
    else
        echo "$SHORT_LENGTH"
    fi
}

# pairs_per_document DOCUMENTS: no more than MAX_PAIRS_PER_DOCUMENT, nor than MAX_PAIRS of all together.
pairs_per_document() {
    local count=$((MAX_PAIRS / $1))
    if [ "$count" -gt "$MAX_PAIRS_PER_DOCUMENT" ]; then
        count=$MAX_PAIRS_PER_DOCUMENT
    elif [ "$count" -lt 1 ]; then
        count=1
    fi
    echo "$count"
}

# pair_batch_size PAIRS: no more than MAX_BATCH_SIZE, nor than a quarter of the pairs.
pair_batch_size() {
    local quarter=$(($1 / 4))
    if [ "$quarter" -lt "$MAX_BATCH_SIZE" ]; then
        echo "$quarter"
    else
        echo "$MAX_BATCH_SIZE"
    fi
}

# train_encoder FOLDER TEXTS FLAGS...: train.py on a file of this recipe; checkpoints go to FOLDER.
train_encoder() {
    local folder=$1 texts=$2
    shift 2
    "$PYTHON" train.py --device "$DEVICE" --plain_text --train_set_file "$texts" --save_dir "$folder" \
        --visualdl_dir "$folder/log" "$@" >&2
}

# whiten_encoder FOLDER TEXTS LENGTH: writes FOLDER/model_0_whitened.
whiten_encoder() {
    train_encoder "$1" "$2" --model_name_or_path "$ENCODER" --pooling "$POOLING" --max_seq_length "$3" \
        --epochs 0 --whiten
}

# make_document_pairs TEXTS DOCUMENTS PAIRS: writes the file PAIRS.
make_document_pairs() {
    "$PYTHON" scripts/make_pairs.py --plain_text --corpus_file "$1" --corpus_columns 1 --output_file "$3" \
        --pairs_per_document "$(pairs_per_document "$2")"
}

# train_on_pairs FOLDER PAIRS CHECKPOINT: writes FOLDER/model_<step>_whitened.
train_on_pairs() {
    local pairs
    pairs=$(wc -l <"$2")
    train_encoder "$1" "$2" --init_from_ckpt "$3" --epochs "$PAIR_EPOCHS" --batch_size "$(pair_batch_size "$pairs")" \
        --learning_rate "$PAIR_LEARNING_RATE" --dropout 0 --output_dropout 0 --whiten
}

# trained_checkpoint FOLDER: what train_on_pairs has written there.
trained_checkpoint() {
    local checkpoints=("$1"/model_*_whitened)
    echo "${checkpoints[0]}"
}

# --------------------------------------------------------------------------------------------------- a file of the user
# check_file FILE: what the shell can see without Python.
check_file() {
    case $1 in -*) refuse "$1: no such flag; usage: bash scripts/quickstart.sh [FILE [QUERY ...]]" ;; esac
    [ -e "$1" ] || refuse "$1: no such file"
    [ -f "$1" ] || refuse "$1: not a regular file; it is read several times"
    [ -r "$1" ] || refuse "$1: permission denied"
}

# check_folder FOLDER FILE: refuse a folder that is not run_recipe's own, or in which FILE is.
check_folder() {
    if [ ! -e "$1" ]; then
        return
    fi
    if [ ! -d "$1" ] || { [ ! -e "$1/$OWN_MARK" ] && [ -n "$(ls -A "$1")" ]; }; then
        refuse "OUT=$1: it is there already, and not of an earlier run with a file; name another folder"
    fi
    local file_folder own_folder
    file_folder=$(cd "$(dirname "$2")" && pwd -P)
    own_folder=$(cd "$1" && pwd -P)
    case $file_folder/ in "$own_folder"/*) refuse "OUT=$1: $2 is in it; name another folder" ;; esac
}

# install_for_device: .venv, and DEVICE where it is not set. Without a GPU, or without paddle for it, that is cpu.
install_for_device() {
    if compgen -G '.venv/lib/python*/site-packages/paddlepaddle_gpu-*' >/dev/null; then
        # Somebody has installed it as docs/en/training.md says; requirements.txt would write over it.
        if [ -z "${DEVICE:-}" ] && nvidia-smi -L >/dev/null 2>&1; then
            DEVICE=gpu
        fi
    else
        make_venv .venv requirements.txt # sets `file`, as its loop does
    fi
    DEVICE=${DEVICE:-cpu}
}

# clear_folder FOLDER: remove what an earlier run has written to it.
clear_folder() {
    local name
    for name in $OWN_FILES; do
        rm -rf "${1:?}/$name"
    done
}

# attempt COMMAND...: run it; return 2 where it refuses its input, and end with its exit code where it fails otherwise.
attempt() {
    local code=0
    "$@" || code=$?
    case $code in
    0 | 2) return "$code" ;;
    *) exit "$code" ;;
    esac
}

# whiten_texts FOLDER TEXTS COUNT LENGTH: sets `checkpoint`, and `is_whitened` to true or false.
whiten_texts() {
    is_whitened=true
    if [ "$3" -ge "$MIN_WHITENING_TEXTS" ] && attempt whiten_encoder "$1/whitened" "$2" "$4"; then
        checkpoint=$1/whitened/model_0_whitened
        return
    fi
    say "too few texts to whiten and to train on ($3 documents and clauses, $MIN_WHITENING_TEXTS are needed);" \
        "the encoder stays as it is"
    is_whitened=false
    train_encoder "$1/whitened" "$2" --model_name_or_path "$ENCODER" --pooling "$POOLING" --max_seq_length "$4" \
        --epochs 0
    checkpoint=$1/whitened/model_0
}

# pair_texts TEXTS DOCUMENTS PAIRS: writes the file PAIRS where there are pairs to make.
pair_texts() {
    if [ "$is_whitened" = false ]; then
        say "no pairs are made"
    elif ! attempt make_document_pairs "$@"; then
        say "no pairs; the texts are too short"
    fi
}

# train_on_texts FOLDER PAIRS: sets `checkpoint` where there are pairs to learn from, in batches of two or more.
train_on_texts() {
    local count=0
    if [ -e "$2" ]; then
        count=$(wc -l <"$2")
    fi
    if [ "$(pair_batch_size "$count")" -gt 1 ] && attempt train_on_pairs "$1/trained" "$2" "$checkpoint"; then
        checkpoint=$(trained_checkpoint "$1/trained")
        return
    fi
    say "too few pairs to train on ($((count))); the checkpoint stays $checkpoint"
}

# answer_queries FOLDER FILE: build the index and answer the queries of FOLDER/queries.txt.
answer_queries() {
    local query queries=()
    while IFS= read -r query; do
        queries+=(--query="$query")
    done <"$1/queries.txt"
    "$PYTHON" recall.py --device "$DEVICE" --params_path "$checkpoint" --corpus_file "$2" --index_path "$1/index" \
        --hybrid_bm25 --distinct --top_k "$TOP_K" "${queries[@]}" >"$1/answers.tsv"
}

# quoted WORD: as a shell reads it.
quoted() {
    case $1 in
    *[!A-Za-z0-9_./-]*) printf "'%s'" "${1//\'/\'\\\'\'}" ;;
    *) printf '%s' "$1" ;;
    esac
}

# print_next_commands FOLDER FILE
print_next_commands() {
    local file index model output recall result
    file=$(quoted "$2")
    index=$(quoted "$1/index")
    model=$(quoted "$checkpoint")
    output=$(quoted "$1/output")
    result=$(quoted "$1/result")
    recall=".venv/bin/python recall.py --device $DEVICE --params_path $model --index_path $index --hybrid_bm25"
    cat <<END

The commands below are for the folder $PWD.

More queries:
  $recall --top_k $TOP_K --query TEXT

The search page of these documents, at http://127.0.0.1:8000:
  .venv/bin/pip install -r requirements-serving.txt
  PARAMS_PATH=$model OUTPUT_DIR=$output sh scripts/export_model.sh
  DEVICE=$DEVICE OUTPUT_DIR=$output INDEX_PATH=$index sh scripts/serve.sh

Recall@k, with a dev.csv of queries and their documents, tab-separated:
  $recall --corpus_file $file --similar_text_pair dev.csv --recall_num 50 --recall_result_dir $result
  .venv/bin/python evaluate.py --similar_text_pair dev.csv --recall_result_file $result/recall_result.txt
END
}

# run_recipe FILE [QUERY ...]: from a file of documents to answers and a kept index, in OUT. Sets PYTHON and DEVICE.
run_recipe() {
    local corpus=$1 name out size documents whitening_texts tokens length query queries=() started=$SECONDS
    shift
    check_file "$corpus"
    name=$(basename "$corpus")
    name=${name%.*}
    out=${OUT:-quickstart/${name:-texts}}
    check_folder "$out" "$corpus"
    for query in "$@"; do
        [ "$query" != - ] || refuse "-: queries from stdin are not read; recall.py --query reads them"
        queries+=(--query="$query")
    done

    begin "1/6 install into .venv"
    install_for_device
    choose_recipe
    PYTHON=$PWD/.venv/bin/python
    finish

    begin "2/6 read $corpus"
    mkdir -p "$out"
    touch "$out/$OWN_MARK"
    size=$("$PYTHON" scripts/sample_texts.py --corpus_file "$corpus" --texts_file "$out/texts.txt" \
        --whitening_file "$out/whitening.txt" --query_file "$out/queries.txt" --max_texts "$MAX_PAIRS" \
        --queries "$QUERIES" ${queries[@]+"${queries[@]}"})
    read -r documents whitening_texts tokens <<<"$size"
    length=$(sequence_length "$tokens")
    clear_folder "$out"
    finish

    begin "3/6 whiten $POOLING, $length tokens"
    whiten_texts "$out" "$out/whitening.txt" "$whitening_texts" "$length"
    finish

    begin "4/6 pairs from documents"
    pair_texts "$out/texts.txt" "$documents" "$out/pairs.csv"
    finish

    begin "5/6 train on the pairs, whiten again"
    train_on_texts "$out" "$out/pairs.csv"
    finish

    begin "6/6 index with BM25, answers"
    answer_queries "$out" "$corpus"
    finish
    say "$((SECONDS - started)) s in all; files in $out/"

    "$PYTHON" scripts/print_answers.py <"$out/answers.tsv"
    print_next_commands "$out" "$corpus"
}
