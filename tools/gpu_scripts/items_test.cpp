#define __device__
#define __host__
#define __global__
#define __grid_constant__
#include <algorithm>
#include <cstdio>
#include <map>
#include <set>
#include <vector>
#include <random>
struct Idx { int x = 0; }; static Idx threadIdx;
template <class T> T __shfl_sync(unsigned, T v, int) { return v; }
template <class T> T atomicAdd(T* p, T v) { T o = *p; *p += v; return o; }
using std::max; using std::min;
#include "csrc/cuda/sm90/backward/work.cuh"
using namespace rrattn; using namespace rrattn::cuda::sm90::backward;
struct T128 { using Element = uint16_t; static constexpr int kHeadDim=128,kHeadDimV=128,kKeys=128; };
struct T64 { using Element = uint16_t; static constexpr int kHeadDim=64,kHeadDimV=64,kKeys=128; };
struct T256 { using Element = uint16_t; static constexpr int kHeadDim=256,kHeadDimV=256,kKeys=64; };
template <class T> bool run(int B,int Hq,int Hk,int64_t Lq,int64_t Lk,bool causal,bool print=false){
  BackwardParams p; p.visibility.batch=B; p.visibility.num_heads=Hq; p.heads.num_heads_k=Hk; p.visibility.seqlen_q=Lq; p.visibility.seqlen_k=Lk; p.visibility.causal=causal;
  WorkOrder o = choose_work_order<T>(p);
  int Mq=p.visibility.num_m_blocks(), Mk=p.visibility.num_n_blocks(), G=Hq/Hk, tiles=Mk*(128/T::kKeys);
  if(print) printf("B%d %d/%d Lq %ld Lk %ld D%d: parts %d (heads %d, blocks %d, windows %d) items %d section %d round %d sums %.0f MB\n",B,Hq,Hk,(long)Lq,(long)Lk,T::kHeadDim,o.num_parts,o.part_heads,o.part_blocks,o.windows,o.num_items,o.section_heads,o.round_tiles,o.num_parts>1?o.num_slots()*double(T::kKeys)*(T::kHeadDim+T::kHeadDimV)*4/1048576:0.);
  if (print) return true;
  std::vector<int> ticket(o.num_slots(),0); std::map<std::pair<int,int>,std::vector<std::pair<int,int>>> cover; std::set<std::vector<int>> seen;
  std::vector<int> lasts(B*Hk*tiles,0);
  for(int i=0;i<o.num_items;++i){ Place<T::kKeys> pl(p,o,i);
    if(pl.batch<0||pl.batch>=B||pl.key_head<0||pl.key_head>=Hk||pl.key_tile<0||pl.key_tile>=tiles||pl.part<0||pl.part>=o.num_parts) {printf("range\n");return false;}
    if(!seen.insert({pl.batch,pl.key_head,pl.key_tile,pl.part}).second){printf("twice\n");return false;}
    int w=pl.window(o), fw=pl.first_window(p.visibility,o);
    int fh=pl.part/o.windows*o.part_heads, eh=min(G,fh+o.part_heads), fm=w*o.part_blocks, em=min(Mq,fm+o.part_blocks);
    if(fh>=G){printf("heads\n");return false;}
    bool any=!causal; for(int m=fm;m<em&&!any;++m){int64_t last=min<int64_t>((m+1)*128,Lq)-1; if(pl.first_key()<=last+Lk-Lq) any=true;}
    if(Lq>0 && pl.first_key()<Lk && (w>=fw)!=any){printf("exists %d %d fw %d w %d\n",w>=fw,any,fw,w);return false;}
    if(w<fw) continue;
    bool last=pl.part==o.num_parts-1; if(last) lasts[(pl.batch*Hk+pl.key_head)*tiles+pl.key_tile]++;
    if(o.num_parts==1) continue;
    int head=pl.batch*Hk+pl.key_head, section=head/o.section_heads, round=pl.key_tile/o.round_tiles, tile=pl.key_tile%o.round_tiles;
    int slot=tile*o.section_heads+head%o.section_heads;
    int sr=(o.num_key_tiles-1-tile)/o.round_tiles+1, ft=(section*sr+round)*o.num_parts;
    int turn=ft+pl.part/o.windows*(o.windows-fw)+w-fw, next=last?ft+o.num_parts:turn+1;
    if(slot>=o.num_slots()||ticket[slot]!=turn){printf("turn slot %d has %d wants %d item %d\n",slot,ticket[slot],turn,i);return false;}
    ticket[slot]=next;
  }
  for(int l:lasts) if(l!=1){printf("last %d\n",l);return false;}
  return true;
}
int main(){ std::mt19937 g(1); auto r=[&](int a,int b){return a+int(g()%(b-a+1));}; int bad=0,n=0,many=0;
 for(int i=0;i<1500;++i){int Hk=r(1,4),G=r(1,9),B=r(1,2); int64_t Lk=r(1,i%4?20000:150000),Lq=r(i%5?1:0,Lk); bool c=r(0,1); if(i%3==0) Lq=Lk;
  bool ok = i%3==0?run<T128>(B,Hk*G,Hk,Lq,Lk,c):i%3==1?run<T64>(B,Hk*G,Hk,Lq,Lk,c):run<T256>(B,Hk*G,Hk,Lq,Lk,c); ++n; if(!ok){++bad;printf("BAD B%d G%d Hk%d %ld %ld %d\n",B,G,Hk,(long)Lq,(long)Lk,c);} }
 printf("%d of %d bad\n",bad,n);
 auto s=[&](int B,int Hq,int Hk,int L){run<T128>(B,Hq,Hk,L,L,true,true);};
 s(1,32,8,2048);s(1,32,8,4096);s(1,32,8,8192);s(1,32,8,16384);s(1,32,8,32768);s(1,32,8,131072);s(1,32,1,8192);s(1,32,1,16384);s(1,28,4,16384);s(1,4,1,65536);s(8,32,8,4096);s(32,32,8,2048);s(1,32,32,16384);s(1,32,1,131072);s(1,12,3,8192);s(1,32,1,4096);s(1,4,2,80000);
 run<T64>(1,32,8,16384,16384,true,true);run<T64>(1,2,1,140000,140000,true,true);run<T256>(1,32,8,16384,16384,true,true);run<T256>(1,2,2,40000,40000,true,true);
}
