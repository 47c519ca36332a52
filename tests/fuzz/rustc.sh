#!/bin/sh
# Stands before the compiler while the fuzz targets are built: the program and the targets are instrumented for
# libFuzzer, what they stand on is compiled as always (and so is shared with the program's own build).
case " $* " in
*" --crate-name embassyfs "* | *" --crate-name fuzz "*)
    exec "$@" -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions --cfg fuzzing
    ;;
esac
exec "$@"
