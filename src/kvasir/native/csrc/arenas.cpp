// Arenas of Python's allocator in huge pages. It takes them one by one, of 1 MiB, which the kernel never joins to pages of
// 2 MiB by itself: here many are taken at once, aligned and advised. What is given back is kept for the next that is taken.
// Python takes its threads' stacks from the same allocator, in other sizes, which come and go as they do without us.

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

namespace {

constexpr size_t kArena = size_t{1} << 20;
constexpr size_t kHuge = size_t{2} << 20;
constexpr size_t kTaken = size_t{32} << 20;

struct ArenaAllocator {  // PyObjectArenaAllocator
    void* context;
    void* (*alloc)(void* context, size_t size);
    void (*free)(void* context, void* arena, size_t size);
};

std::vector<void*> spare;  // under the GIL, as all of this

char* mapped(size_t size) {
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? nullptr : static_cast<char*>(at);
}

bool take_many() {
    char* at = mapped(kTaken + kHuge);
    if (at == nullptr) return false;
    at += -reinterpret_cast<uintptr_t>(at) % kHuge;
#if defined(MADV_HUGEPAGE)
    madvise(at, kTaken, MADV_HUGEPAGE);
#endif
    for (char* arena = at + kTaken; arena != at;) spare.push_back(arena -= kArena);
    return true;
}

void* take(void*, size_t size) {
    if (size != kArena) return mapped(size);
    try {
        if (spare.empty() && !take_many()) return nullptr;
    } catch (const std::bad_alloc&) {
        if (spare.empty()) return nullptr;
    }
    void* arena = spare.back();
    spare.pop_back();
    return arena;
}

// Also what Python mapped itself before this allocator was set.
void give_back(void*, void* arena, size_t size) {
    try {
        if (size == kArena) return spare.push_back(arena);
    } catch (const std::bad_alloc&) {
    }
    munmap(arena, size);
}

}  // namespace

extern "C" void PyObject_SetArenaAllocator(ArenaAllocator*);  // of the interpreter that loads this

extern "C" void kvasir_use_huge_arenas() {
    ArenaAllocator ours{nullptr, take, give_back};
    PyObject_SetArenaAllocator(&ours);
}
