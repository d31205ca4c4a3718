#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

enum { LINE = 64, SPINS = 4000 };

/* `open`: the run's number and how many chunks nobody has taken. `left`: chunks that are not done. */
typedef struct {
    _Alignas(LINE) _Atomic uint64_t open;
    _Alignas(LINE) _Atomic uint32_t left;
} region;

struct pool {
    int threads, capacity;
    pid_t process; /* whose threads they are: a fork has none of them */
    region *regions;
    _Atomic int count;
    _Atomic uint32_t run;
    work *work;
    void *context;
    pthread_t *handles;
    struct member {
        pool *pool;
        int number;
    } *members;
    pthread_mutex_t lock;
    pthread_cond_t begun;
    int closing;
};

static void pause_briefly(int spins) {
    if (spins > SPINS)
        sched_yield();
#if defined(__x86_64__)
    else
        __builtin_ia32_pause();
#elif defined(__aarch64__)
    else
        __asm__ volatile("yield");
#endif
}

/* The number of a chunk, or -1 when none is left or the run is over. */
static int take(region *r, uint32_t run) {
    uint64_t seen = atomic_load_explicit(&r->open, memory_order_acquire);
    while ((uint32_t)(seen >> 32) == run && (uint32_t)seen)
        if (atomic_compare_exchange_weak_explicit(&r->open, &seen, seen - 1, memory_order_acq_rel, memory_order_acquire))
            return (int)(uint32_t)seen - 1;
    return -1;
}

static void participate(pool *p, int thread, uint32_t run) {
    int count = atomic_load_explicit(&p->count, memory_order_acquire);
    for (int i = 0; i < count; i++) {
        region *r = p->regions + i;
        for (int chunk; (chunk = take(r, run)) >= 0;) {
            p->work(p->context, i, chunk, thread);
            atomic_fetch_sub_explicit(&r->left, 1, memory_order_acq_rel);
        }
        for (int spins = 0; atomic_load_explicit(&r->left, memory_order_acquire); spins++) {
            if (atomic_load_explicit(&p->run, memory_order_acquire) != run) return;
            pause_briefly(spins);
        }
    }
}

static void *follow(void *argument) {
    struct member *me = argument;
    pool *p = me->pool;
    uint32_t seen = 0;
    for (;;) {
        for (int spins = 0; spins < SPINS && atomic_load_explicit(&p->run, memory_order_acquire) == seen; spins++)
            pause_briefly(0);
        pthread_mutex_lock(&p->lock);
        while (!p->closing && atomic_load_explicit(&p->run, memory_order_acquire) == seen)
            pthread_cond_wait(&p->begun, &p->lock);
        int closing = p->closing;
        pthread_mutex_unlock(&p->lock);
        if (closing) return NULL;
        seen = atomic_load_explicit(&p->run, memory_order_acquire);
        participate(p, me->number, seen);
    }
}

pool *pool_new(int threads, int regions) {
    pool *p = calloc(1, sizeof *p);
    if (!p) return NULL;
    p->threads = 1;
    p->process = getpid();
    p->capacity = regions;
    p->regions = aligned_alloc(LINE, sizeof(region) * (size_t)regions);
    p->handles = calloc((size_t)threads, sizeof *p->handles);
    p->members = calloc((size_t)threads, sizeof *p->members);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->begun, NULL);
    if (!p->regions || !p->handles || !p->members) {
        pool_free(p);
        return NULL;
    }
    for (int i = 0; i < regions; i++) {
        atomic_init(&p->regions[i].open, 0);
        atomic_init(&p->regions[i].left, 0);
    }
    for (int i = 1; i < threads; i++) {
        p->members[i] = (struct member){p, i};
        if (pthread_create(p->handles + i, NULL, follow, p->members + i)) break; /* fewer will do */
        p->threads = i + 1;
    }
    return p;
}

void pool_free(pool *p) {
    if (!p || p->process != getpid()) return;
    pthread_mutex_lock(&p->lock);
    p->closing = 1;
    pthread_cond_broadcast(&p->begun);
    pthread_mutex_unlock(&p->lock);
    for (int i = 1; i < p->threads; i++) pthread_join(p->handles[i], NULL);
    pthread_cond_destroy(&p->begun);
    pthread_mutex_destroy(&p->lock);
    free(p->regions);
    free(p->handles);
    free(p->members);
    free(p);
}

int pool_threads(const pool *p) { return p->threads; }

void pool_run(pool *p, int regions, const int *chunks, work *work, void *context) {
    uint32_t run = atomic_load_explicit(&p->run, memory_order_relaxed) + 1;
    /* A thread that still looks for work of the last run finds none: that run is over, and its number is gone. */
    p->work = work;
    p->context = context;
    for (int i = 0; i < regions; i++) {
        atomic_store_explicit(&p->regions[i].left, (uint32_t)chunks[i], memory_order_release);
        atomic_store_explicit(&p->regions[i].open, (uint64_t)run << 32 | (uint32_t)chunks[i], memory_order_release);
    }
    atomic_store_explicit(&p->count, regions, memory_order_release);
    pthread_mutex_lock(&p->lock);
    atomic_store_explicit(&p->run, run, memory_order_release);
    pthread_cond_broadcast(&p->begun);
    pthread_mutex_unlock(&p->lock);
    participate(p, 0, run);
}
