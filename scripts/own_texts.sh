# Read by quickstart.sh, under bash: train an encoder on documents without labels and search them. The encoder is
# whitened on the documents and trained on pairs that are made from them (docs/en/better-recall.md#pairs-from-documents).
# run_on_file does that with a file of the user, builds the index and answers queries.
ENCODER=pretrained/ernie_mini_zh
MAX_PAIRS=240000           # about as many as 2 cores train on within minutes
MAX_PAIRS_PER_DOCUMENT=20  # reached by files of up to 12,000 documents
MIN_WHITENING_TEXTS=500    # documents and clauses; on fewer, whitening and training do harm
MIN_BATCH_SIZE=2           # a query needs the document of another one as a negative
SHORT_LENGTH=64            # tokens of titles and questions; texts with more are long
QUERIES=3                  # taken out of the documents where the user gives none
TOP_K=5                    # documents printed for each query
# What run_on_file and the commands that it prints write to its folder, besides files that are always written over.
OWN_FILES="pairs.csv whitened trained index answers.tsv output result"
OWN_MARK=made_by_quickstart  # an empty file in a folder that run_on_file may clear

say() { printf '== %s\n' "$*" >&2; }

refuse() { # refuse MESSAGE: end with one line and exit code 2
    printf 'quickstart.sh: error: %s\n' "$*" >&2
    exit 2
}

# run_step NAME COMMAND...: run it, and say before and after what it is and how long it took.
run_step() {
    local name=$1 started=$SECONDS
    shift
    say "$name ..."
    "$@"
    say "$name: $((SECONDS - started)) s"
}

# choose_settings TOKENS: set POOLING, MAX_BATCH_SIZE, LENGTH, PAIR_EPOCHS and PAIR_LEARNING_RATE by DEVICE and by the
# length of the texts. Short texts give hardly any queries but of words; long training on those lowers recall.
choose_settings() {
    local texts=long
    if [ "$1" -le "$SHORT_LENGTH" ]; then
        texts=short
    fi
    case $DEVICE in
    cpu)
        POOLING=first_avg    # no layers: fast without a GPU
        MAX_BATCH_SIZE=4096  # many negatives for each query
        ;;
    gpu)
        POOLING=first_last_avg
        MAX_BATCH_SIZE=128
        ;;
    *) refuse "DEVICE=$DEVICE: expected cpu or gpu" ;;
    esac
    # LENGTH: tokens that are read of a text. PAIR_EPOCHS: passes over the pairs.
    case $DEVICE-$texts in
    cpu-long) LENGTH=512 PAIR_EPOCHS=4 PAIR_LEARNING_RATE=4e-3 ;;
    cpu-short) LENGTH=$SHORT_LENGTH PAIR_EPOCHS=2 PAIR_LEARNING_RATE=2e-4 ;;
    gpu-long) LENGTH=128 PAIR_EPOCHS=1 PAIR_LEARNING_RATE=2e-4 ;; # every token goes through the layers
    gpu-short) LENGTH=$SHORT_LENGTH PAIR_EPOCHS=1 PAIR_LEARNING_RATE=1e-4 ;;
    esac
}

# pairs_per_document DOCUMENTS: at most MAX_PAIRS_PER_DOCUMENT, and at most MAX_PAIRS for all documents together.
pairs_per_document() {
    local count=$((MAX_PAIRS / $1))
    if [ "$count" -gt "$MAX_PAIRS_PER_DOCUMENT" ]; then
        count=$MAX_PAIRS_PER_DOCUMENT
    elif [ "$count" -lt 1 ]; then
        count=1
    fi
    echo "$count"
}

# pair_batch_size PAIRS: at most MAX_BATCH_SIZE, and at most a tenth of the pairs, for ten steps an epoch or more.
pair_batch_size() {
    local tenth=$(($1 / 10))
    if [ "$tenth" -lt "$MAX_BATCH_SIZE" ]; then
        echo "$tenth"
    else
        echo "$MAX_BATCH_SIZE"
    fi
}

# train_encoder FOLDER TEXTS FLAGS...: train.py on a file of one text or pair a line; checkpoints go to FOLDER.
train_encoder() {
    local folder=$1 texts=$2
    shift 2
    "$PYTHON" train.py --device "$DEVICE" --plain_text --train_set_file "$texts" --save_dir "$folder" \
        --visualdl_dir "$folder/log" "$@" >&2
}

# save_encoder FOLDER TEXTS FLAGS...: writes FOLDER/model_0, the encoder without training.
save_encoder() {
    local folder=$1 texts=$2
    shift 2
    train_encoder "$folder" "$texts" --model_name_or_path "$ENCODER" --pooling "$POOLING" --max_seq_length "$LENGTH" \
        --epochs 0 "$@"
}

# whiten_encoder FOLDER TEXTS: writes FOLDER/model_0_whitened.
whiten_encoder() { save_encoder "$@" --whiten; }

# make_document_pairs TEXTS DOCUMENTS PAIRS: writes the file PAIRS.
make_document_pairs() {
    "$PYTHON" scripts/make_pairs.py --plain_text --corpus_file "$1" --corpus_columns 1 --output_file "$3" \
        --pairs_per_document "$(pairs_per_document "$2")"
}

# train_on_pairs FOLDER PAIRS CHECKPOINT: writes a checkpoint to FOLDER, which trained_checkpoint names.
train_on_pairs() {
    local pairs
    pairs=$(wc -l <"$2")
    train_encoder "$1" "$2" --init_from_ckpt "$3" --epochs "$PAIR_EPOCHS" --batch_size "$(pair_batch_size "$pairs")" \
        --learning_rate "$PAIR_LEARNING_RATE" --dropout 0 --output_dropout 0
}

# trained_checkpoint FOLDER: the checkpoint that train_on_pairs wrote there last.
trained_checkpoint() {
    local weights
    weights=$(ls -t "$1"/model_*/model_state.pdparams | head -n 1)
    dirname "$weights"
}

# --------------------------------------------------------------------------------------------------- a file of the user
# check_file FILE: refuse what the shell can see without Python.
check_file() {
    [ -e "$1" ] || refuse "$1: no such file"
    [ -f "$1" ] || refuse "$1: not a regular file; it is read several times"
    [ -r "$1" ] || refuse "$1: permission denied"
    [ -s "$1" ] || refuse "$1: the file is empty"
}

# check_folder FOLDER FILE: refuse a folder that run_on_file has not made, that holds FILE, or that cannot be made.
check_folder() {
    local parent=$1
    if [ ! -e "$1" ]; then
        while [ ! -e "$parent" ]; do
            parent=$(dirname "$parent")
        done
        { [ -d "$parent" ] && [ -w "$parent" ]; } || refuse "$1: cannot be written; set OUT to another folder"
        return
    fi
    if [ ! -d "$1" ] || { [ ! -e "$1/$OWN_MARK" ] && [ -n "$(ls -A "$1")" ]; }; then
        refuse "OUT=$1: exists and was not made by an earlier run with a file; name another folder"
    fi
    local file_folder own_folder
    file_folder=$(cd "$(dirname "$2")" && pwd -P)
    own_folder=$(cd "$1" && pwd -P)
    case $file_folder/ in "$own_folder"/*) refuse "OUT=$1: $2 is in it; name another folder" ;; esac
}

# check_device: refuse a DEVICE other than cpu and gpu, and gpu without the paddle for it, before anything is installed or
# an earlier run's results are removed.
check_device() {
    case ${DEVICE:-cpu} in
    cpu) ;;
    gpu) has_gpu_paddle ||
        refuse "DEVICE=gpu: there is no paddlepaddle-gpu in .venv; docs/en/training.md says how to install it" ;;
    *) refuse "DEVICE=$DEVICE: expected cpu or gpu" ;;
    esac
}

# check_queries QUERY...: refuse blank queries, flags, and -, which recall.py takes for stdin.
check_queries() {
    local query
    for query in "$@"; do
        case $query in
        -) refuse "-: queries from stdin are not read; recall.py --query reads them" ;;
        --* | -[A-Za-z]*) refuse "$query: only queries follow the file, no flags" ;;
        esac
        [ -n "${query//[[:space:]]/}" ] || refuse "query '$query': is blank"
    done
}

# default_folder FILE: where the results of a file go without OUT. The sample run writes nothing to quickstart/files.
default_folder() {
    local name
    name=$(basename "$1")
    name=${name%.*}
    echo "quickstart/files/${name:-texts}"
}

# has_gpu_paddle: whether .venv has the paddle for GPUs, which somebody has installed as docs/en/training.md says.
has_gpu_paddle() { compgen -G '.venv/lib/python*/site-packages/paddlepaddle_gpu-*' >/dev/null; }

# install_for_device: make .venv, and set DEVICE where the user has not: to gpu with a GPU and paddle for it, else to cpu.
install_for_device() {
    if has_gpu_paddle; then
        # requirements.txt would write over it.
        if [ -z "${DEVICE:-}" ] && nvidia-smi -L >/dev/null 2>&1; then
            DEVICE=gpu
        fi
    else
        make_venv .venv requirements.txt
    fi
    DEVICE=${DEVICE:-cpu}
}

# clear_folder FOLDER: remove what an earlier run has written to it, and say so.
clear_folder() {
    local name removed=
    for name in $OWN_FILES; do
        if [ -e "$1/$name" ]; then
            rm -rf "${1:?}/$name"
            removed="$removed $name"
        fi
    done
    if [ -n "$removed" ]; then
        say "removed what an earlier run made in $1/:$removed"
    fi
}

# sample_corpus FOLDER FILE QUERY...: writes the texts to train on, the queries and the sizes of both to FOLDER, and
# removes what an earlier run has made there. Where the file is refused, that stays.
sample_corpus() {
    local folder=$1 corpus=$2 query queries=()
    shift 2
    for query in "$@"; do
        queries+=(--query="$query")
    done
    { mkdir -p "$folder" && touch "$folder/$OWN_MARK"; } 2>/dev/null ||
        refuse "$folder: cannot be written; set OUT to another folder"
    "$PYTHON" scripts/sample_texts.py --corpus_file "$corpus" --texts_file "$folder/texts.txt" \
        --whitening_file "$folder/whitening.txt" --query_file "$folder/queries.txt" --max_texts "$MAX_PAIRS" \
        --queries "$QUERIES" ${queries[@]+"${queries[@]}"} >"$folder/sizes.txt"
    clear_folder "$folder"
}

# read_size FOLDER NAME: what sample_texts.py printed for NAME.
read_size() { sed -n "s/^$2=//p" "$1/sizes.txt"; }

# whiten_if_enough FOLDER: whiten the encoder on FOLDER/whitening.txt, or save it as it is.
whiten_if_enough() {
    local count
    count=$(read_size "$1" whitening_texts)
    if [ "$count" -ge "$MIN_WHITENING_TEXTS" ]; then
        whiten_encoder "$1/whitened" "$1/whitening.txt"
    else
        say "too few texts to whiten and to train on ($count documents and clauses, $MIN_WHITENING_TEXTS are needed);" \
            "the encoder stays as it is"
        save_encoder "$1/whitened" "$1/whitening.txt"
    fi
}

# make_pairs_if_possible FOLDER: write FOLDER/pairs.csv, unless the texts are too few or too short.
make_pairs_if_possible() {
    if [ "$(read_size "$1" whitening_texts)" -lt "$MIN_WHITENING_TEXTS" ]; then
        say "no pairs are made"
    elif [ "$(read_size "$1" can_make_pairs)" = no ]; then
        say "no pairs are made: every text is too short for a query to be taken out of it"
    else
        make_document_pairs "$1/texts.txt" "$(read_size "$1" documents)" "$1/pairs.csv"
    fi
}

# train_if_enough FOLDER: train on FOLDER/pairs.csv, where it has enough pairs for a batch.
train_if_enough() {
    local checkpoint count=0
    checkpoint=$(last_checkpoint "$1")
    if [ -e "$1/pairs.csv" ]; then
        count=$(wc -l <"$1/pairs.csv")
    fi
    if [ "$(pair_batch_size "$count")" -ge "$MIN_BATCH_SIZE" ]; then
        train_on_pairs "$1/trained" "$1/pairs.csv" "$checkpoint"
    else
        say "too few pairs to train on ($((count))); the checkpoint stays $checkpoint"
    fi
}

# last_checkpoint FOLDER: that of the last step which has written one.
last_checkpoint() {
    if [ -d "$1/trained" ]; then
        trained_checkpoint "$1/trained"
    elif [ -d "$1/whitened/model_0_whitened" ]; then
        echo "$1/whitened/model_0_whitened"
    else
        echo "$1/whitened/model_0"
    fi
}

# answer_queries FOLDER FILE: build the index and answer the queries of FOLDER/queries.txt.
answer_queries() {
    local checkpoint query queries=()
    checkpoint=$(last_checkpoint "$1")
    while IFS= read -r query; do
        queries+=(--query="$query")
    done <"$1/queries.txt"
    "$PYTHON" recall.py --device "$DEVICE" --params_path "$checkpoint" --corpus_file "$2" --index_path "$1/index" \
        --hybrid_bm25 --distinct --top_k "$TOP_K" "${queries[@]}" >"$1/answers.tsv"
}

# explain_scores: what the numbers of a search with --hybrid_bm25 are.
explain_scores() {
    echo "Before each document: its cosine with the query, plus its BM25 score divided by the query's highest."
}

# quoted TEXT: the text as one word of a shell command.
quoted() {
    case $1 in
    *[!A-Za-z0-9_./-]*) printf "'%s'" "${1//\'/\'\\\'\'}" ;;
    *) printf '%s' "$1" ;;
    esac
}

# print_next_commands FOLDER FILE: commands to copy, for the index and the checkpoint in FOLDER.
print_next_commands() {
    local file index model output recall result
    file=$(quoted "$2")
    index=$(quoted "$1/index")
    model=$(quoted "$(last_checkpoint "$1")")
    output=$(quoted "$1/output")
    result=$(quoted "$1/result")
    recall=".venv/bin/python recall.py --device $DEVICE --params_path $model --index_path $index --hybrid_bm25"
    cat <<END

Run these commands in $PWD:

More queries:
  $recall --distinct --top_k $TOP_K --query 'TEXT'

After a change of the file (encodes new texts only; a running search page takes the new index by itself):
  $recall --distinct --top_k $TOP_K --query 'TEXT' --corpus_file $file

The search page of these documents, at http://127.0.0.1:8000:
  .venv/bin/pip install -r requirements-serving.txt
  PYTHON=.venv/bin/python PARAMS_PATH=$model OUTPUT_DIR=$output sh scripts/export_model.sh
  PYTHON=.venv/bin/python DEVICE=$DEVICE OUTPUT_DIR=$output INDEX_PATH=$index sh scripts/serve.sh

Recall@k, with a dev.csv in $PWD, of queries and their documents, tab-separated:
  $recall --corpus_file $file --similar_text_pair dev.csv --recall_num 50 --recall_result_dir $result
  .venv/bin/python evaluate.py --similar_text_pair dev.csv --recall_result_file $result/recall_result.txt
END
}

# run_on_file FOLDER FILE [QUERY ...]: from a file of documents to answers and a kept index, in FOLDER. Sets PYTHON and
# DEVICE.
run_on_file() {
    local out=$1 corpus=$2 started=$SECONDS
    shift 2
    check_file "$corpus"
    check_folder "$out" "$corpus"
    check_queries "$@"
    check_device

    run_step "1/6 install into .venv" install_for_device
    PYTHON=$PWD/.venv/bin/python
    run_step "2/6 read $corpus" sample_corpus "$out" "$corpus" "$@"
    choose_settings "$(read_size "$out" tokens)"
    run_step "3/6 whiten $POOLING, $LENGTH tokens" whiten_if_enough "$out"
    run_step "4/6 pairs from documents" make_pairs_if_possible "$out"
    run_step "5/6 train on the pairs" train_if_enough "$out"
    run_step "6/6 index with BM25, answers" answer_queries "$out" "$corpus"
    say "$((SECONDS - started)) s in all; files in $out/"

    explain_scores
    "$PYTHON" scripts/print_answers.py <"$out/answers.tsv"
    print_next_commands "$out" "$corpus"
}
