/* Runs kernels of a code blob on the cases of a file: for tests of targets that are not this machine.
 *
 * usage: driver CASES OUTPUTS
 *
 * CASES is a list of 64-bit little-endian words and padded byte strings:
 *   number of cases, then per case: offset of the kernel in the blob, grid, number of arguments, then per argument:
 *   kind (0 number, 1 input, 2 output), skew (address modulo 64), number or length in bytes, and the bytes of inputs
 *   and outputs padded to 8.
 * OUTPUTS receives the bytes of all outputs in order. Status 3: a kernel wrote outside its outputs.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__asm__(".section .text\n"
        ".balign 64\n"
        ".globl blob\n"
        "blob: .incbin \"" BLOB "\"\n"
        ".previous\n");
extern const uint8_t blob[];

typedef void (*kernel_fn)(const uint64_t *args, uint64_t begin, uint64_t end);

enum { GUARD = 64, CANARY = 0xa5, MAX_ARGS = 32 };

static const uint8_t *cursor;

static uint64_t word(void) {
    uint64_t v;
    memcpy(&v, cursor, 8);
    cursor += 8;
    return v;
}

static int all_canary(const uint8_t *p, size_t n) {
    for (size_t i = 0; i < n; i++)
        if (p[i] != CANARY) return 0;
    return 1;
}

int main(int argc, char **argv) {
    if (argc != 3) return 1;
    FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
    if (!in || !out) return 1;
    fseek(in, 0, SEEK_END);
    long size = ftell(in);
    rewind(in);
    uint8_t *file = malloc((size_t)size);
    if (!file || fread(file, 1, (size_t)size, in) != (size_t)size) return 1;
    cursor = file;
    for (uint64_t cases = word(), c = 0; c < cases; c++) {
        kernel_fn kernel = (kernel_fn)(uintptr_t)(blob + word());
        uint64_t grid = word(), count = word(), args[MAX_ARGS], kinds[MAX_ARGS], lens[MAX_ARGS];
        uint8_t *memory[MAX_ARGS];
        const uint8_t *first[MAX_ARGS];
        if (count > MAX_ARGS) return 1;
        for (uint64_t a = 0; a < count; a++) {
            kinds[a] = word();
            uint64_t skew = word();
            lens[a] = word();
            memory[a] = NULL;
            if (kinds[a] == 0) {
                args[a] = lens[a];
                continue;
            }
            size_t room = (lens[a] + skew + 3 * GUARD + 63) / 64 * 64;
            memory[a] = aligned_alloc(64, room);
            if (!memory[a]) return 1;
            memset(memory[a], CANARY, room);
            uint8_t *start = memory[a] + GUARD + skew;
            memcpy(start, cursor, lens[a]);
            first[a] = cursor;
            cursor += (lens[a] + 7) / 8 * 8;
            args[a] = (uint64_t)(uintptr_t)start;
        }
        uint64_t middle = grid / 3;
        kernel(args, middle, grid);
        kernel(args, 0, middle);
        for (uint64_t a = 0; a < count; a++) {
            if (!memory[a]) continue;
            const uint8_t *start = (const uint8_t *)(uintptr_t)args[a];
            int intact = all_canary(memory[a], (size_t)(start - memory[a])) && all_canary(start + lens[a], GUARD);
            if (kinds[a] == 1) intact = intact && memcmp(start, first[a], lens[a]) == 0;
            if (!intact) {
                fprintf(stderr, "case %llu: written outside the outputs (argument %llu)\n", (unsigned long long)c,
                        (unsigned long long)a);
                return 3;
            }
            if (kinds[a] == 2 && fwrite(start, 1, lens[a], out) != lens[a]) return 1;
            free(memory[a]);
        }
    }
    return fclose(out) == 0 ? 0 : 1;
}
