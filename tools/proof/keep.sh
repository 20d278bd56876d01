# keep NAME LINES COMMAND...: runs the command; its last LINES lines go to tools/proof/NAME.txt with the commit they are of
keep() {
    local name="$1" lines="$2" status=0 log
    shift 2
    log="$(mktemp)"
    "$@" 2>&1 | tee "$log" || status=$?
    {
        echo "$(git describe --always --dirty), $("$PYTHON" --version); exit code $status"
        tail -n "$lines" "$log" | sed "s#$PWD/##g"
    } >"tools/proof/$name.txt"
    rm -f "$log"
    return "$status"
}
