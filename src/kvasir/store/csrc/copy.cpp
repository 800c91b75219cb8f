// Copies that go past the caches. A plain copy reads each line of the target before it overwrites it, and leaves both in the
// caches instead of what the program works with; streaming stores do neither. Compiled for the machine that it runs on.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr size_t kLine = 64;

#if defined(__AVX512F__)
inline void stream_line(char* target, const char* source) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target), _mm512_loadu_si512(source));
}
#elif defined(__AVX__)
inline void stream_line(char* target, const char* source) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + 32), high);
}
#endif

}  // namespace

// Whether this machine has streaming stores that are wide enough to be worth it.
extern "C" int kvasir_can_stream() {
#if defined(__AVX__)
    return 1;
#else
    return 0;
#endif
}

// `length` bytes; the two ranges must not overlap. Others see the target complete when this has returned.
extern "C" void kvasir_stream(char* target, const char* source, size_t length) {
#if defined(__AVX__)
    size_t head = -reinterpret_cast<uintptr_t>(target) % kLine;
    if (head > length) head = length;
    std::memcpy(target, source, head);
    target += head, source += head, length -= head;
    size_t at = 0;
    for (; at + 4 * kLine <= length; at += 4 * kLine) {
        stream_line(target + at, source + at);
        stream_line(target + at + kLine, source + at + kLine);
        stream_line(target + at + 2 * kLine, source + at + 2 * kLine);
        stream_line(target + at + 3 * kLine, source + at + 3 * kLine);
    }
    _mm_sfence();
    std::memcpy(target + at, source + at, length - at);
#else
    std::memcpy(target, source, length);
#endif
}
