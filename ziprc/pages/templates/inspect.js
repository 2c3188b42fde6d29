"use strict";
// Tokens in the colour of the expected score, and behind the token under the pointer the joint, or its rivals. Model text only ever becomes `textContent`.
const data=JSON.parse(document.getElementById("data").textContent);
const main=document.querySelector("main"),head=document.getElementById("head"),table=document.querySelector("#panel table");
const stops=[[239,122,92],[246,224,150],[118,184,232]];
const colour=x=>{const s=Math.min(Math.max(x,0),1)*2,i=Math.min(Math.floor(s),1),f=s-i;
  return "rgb("+stops[i].map((a,k)=>Math.round(a+(stops[i+1][k]-a)*f)).join(",")+")"};
const make=(tag,text,name)=>{const e=document.createElement(tag);if(text!==undefined)e.textContent=text;if(name)e.className=name;return e};
let on=null;
function rivals(r,t){
  const before=t?r.expected[t-1]:r.start;
  head.textContent=`token ${t+1} of ${r.length} · expected score ${before.toFixed(3)} before it, ${r.expected[t].toFixed(3)} behind it`;
  const top=make("tr");["token","reference","worth"].forEach(name=>top.append(make("th",name)));table.replaceChildren(top);
  for(const [text,p,q,taken] of r.candidates[t]){const row=make("tr");
    row.append(make("th",(taken?"★ ":"")+JSON.stringify(text)),make("td",(100*p).toFixed(1)+"%"));
    const c=make("td",q.toFixed(3));c.style.background=colour(q);c.style.color="#14181d";row.append(c);table.append(row)}
}
function show(r,t,span){
  if(on)on.classList.remove("on");on=span;span.classList.add("on");
  if(r.candidates)return rivals(r,t);
  head.textContent=`token ${t} of ${r.length} · expected score ${r.expected[t].toFixed(2)} · median ${r.median[t].toFixed(0)} `+
    `tokens to come, really ${r.length-t}`;
  table.replaceChildren();
  const L=data.lengths.length,top=make("tr");top.append(make("th","score \\ left"));
  data.lengths.forEach(l=>top.append(make("th",l)));table.append(top);
  const best=Math.max(...r.joint[t]);
  for(let i=data.rewards.length-1;i>=0;i--){const row=make("tr");row.append(make("th",data.rewards[i]));
    for(let l=0;l<L;l++){const p=r.joint[t][i*L+l],c=make("td",p>=.005?(100*p).toFixed(0)+"%":"");
      c.style.background=`rgba(var(--accent),${(best?p/best:0)*.75})`;row.append(c)}
    table.append(row)}
}
for(const r of data.rollouts){
  const box=make("article");box.append(make("h2",r.question));
  const meta=make("div",`${r.difficulty} · ${r.length} tokens · ${r.id} · `,"meta");
  meta.append(make("span",r.verdict,r.verdict.replace(" ","-")));box.append(meta);
  const line=make("div",undefined,"tokens");
  r.tokens.forEach((text,t)=>{const s=make("span",text.replace(/\n/g,"⏎\n"));s.style.background=colour(r.expected[t]);
    s.tabIndex=t?-1:0;s.onpointerenter=s.onclick=s.onfocus=()=>show(r,t,s);line.append(s)});
  line.onkeydown=e=>{const d={ArrowRight:"nextSibling",ArrowLeft:"previousSibling"}[e.key];
    const s=d&&document.activeElement[d];if(s){s.focus();e.preventDefault()}};
  if(r.tokens.length<r.length)line.append(make("em",` … ${r.length-r.tokens.length} more tokens`));
  box.append(line);main.append(box);
}
const first=data.rollouts[0];if(first)show(first,0,document.querySelector(".tokens span"));
