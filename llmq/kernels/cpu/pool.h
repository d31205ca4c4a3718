/* Threads that work through a list of regions, each cut into chunks that whoever is free takes.

   A region begins when every chunk of the one before is done; nobody waits for a thread, only for chunks, so a thread
   that the system does not let run delays nothing that it has not begun. */
#pragma once

typedef struct pool pool;

/* Do chunk `chunk` of region `region`; `thread` counts from 0. */
typedef void work(void *context, int region, int chunk, int thread);

/* `threads` with the caller's; at most `regions` regions a run. NULL without memory or threads. */
pool *pool_new(int threads, int regions);
void pool_free(pool *);
int pool_threads(const pool *);

/* Run `regions` regions of `chunks[i]` chunks; returns when all are done. One run at a time. */
void pool_run(pool *, int regions, const int *chunks, work *, void *context);
