/** Text of the kinds that models write, for tests that need real tokens. All of it was written for this project. */

const PROSE = `The ferry left an hour late, which nobody on the island would have called late. A woman stood at the rail with two bags and a cat in a basket, and watched the harbour shrink until the lighthouse was a pencil stuck upright in the sand. She had promised to write every week. She knew already that she would write twice, perhaps three times, and that the letters would be about the weather.

"You'll be seasick," said the man beside her, not unkindly. He had the look of someone who sold things: insurance, perhaps, or second-hand tractors.

"I grew up on boats."

"That's what they all say." He offered her a peppermint all the same.

To get a loaf with an open crumb, the dough has to be wetter than most beginners dare. Start with 500 grams of strong flour, 375 grams of water, 100 grams of active starter and 10 grams of salt. Mix everything but the salt, wait forty minutes, then fold the salt in with wet hands. Over the next three hours you fold the dough four times; each fold makes it a little stronger, and by the last one it should hold its shape for a moment before it relaxes. Don't hurry it. A cold kitchen simply needs more time, and more time gives more flavour.

There are three reasons why the bridge was closed. First, the inspection in March found cracks in two of the hangers, neither of them long, but both in places where the drawings showed no stress at all. Second, the traffic had doubled since the calculations were made in 1974. Third, and this is what the report hardly mentions, nobody could say who was responsible for the bearings: the county thought the railway, the railway thought the county, and the grease had dried out years ago.

Sure! Here's a short summary of what we discussed. Your lease ends on 30 September, and you have to give notice in writing at least three months before that. The deposit must be returned within 30 days, minus documented repairs. Normal wear, such as faded paint or small nail holes, is the landlord's business and not yours. If the landlord refuses, you can take the case to the rent tribunal, which costs nothing; most cases are settled at the first hearing. I'd recommend taking dated photographs of every room before you hand over the keys.

Photosynthesis happens in two stages. In the first, light strikes chlorophyll in the thylakoid membranes, and its energy is used to split water into oxygen, protons and electrons. The electrons travel down a chain of proteins, pumping protons as they go, and the gradient that builds up drives an enzyme called ATP synthase. In the second stage, known as the Calvin cycle, the ATP and NADPH made before are spent on fixing carbon dioxide into sugars. Plants in hot, dry climates have found ways round the cycle's weak point, an enzyme that grabs oxygen about as readily as carbon dioxide: maize concentrates the gas in special cells, and cacti open their pores only at night.

Okay, the user wants to know whether they can combine these two medications. Let me think about this carefully. Ibuprofen is an NSAID; low-dose aspirin is used as a blood thinner. Ibuprofen may block aspirin's access to platelets if it is taken first. The usual advice is to take aspirin at least 30 minutes before, or 8 hours after. I should mention bleeding risks, and say that they should ask a pharmacist. I shouldn't be alarmist, though. I'll give the short answer first, then the detail.

It was Grandfather who taught us to read the river. Not the words people use, the riffles and eddies and tailouts, but the thing itself: how the surface goes glassy over a drowned stone, how foam drifts where the food drifts, how a trout that means to feed hangs a hand's breadth higher than one that doesn't. He couldn't swim. He thought it unnecessary. "If you fall in," he used to say, "you've already made your mistake."

Negotiations over the fishing grounds broke down again on Tuesday, the fourth time since spring. Both delegations blamed quotas; observers blamed elections. Cod stocks in the northern sector have recovered to about 70% of their 1990 level, according to figures published last month, while herring remains well below the limit that scientists consider safe. A spokeswoman said talks would resume "when there is something to talk about".

Dear applicant, thank you for your application for the position of laboratory technician. We were impressed by your experience with mass spectrometry and would like to invite you to an interview on Thursday, 14 May, at 10:30 in building C. Please bring proof of your qualifications and, if you have them, copies of any publications. Travel expenses will be reimbursed up to £85. If the date doesn't suit you, do let us know and we'll find another. Yours sincerely, the personnel office.

`

const CODE = `import csv
import sqlite3
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import datetime, timedelta


@dataclass(frozen=True)
class Reading:
    station: str
    taken_at: datetime
    celsius: float
    flags: set[str] = field(default_factory=set)

    @property
    def fahrenheit(self) -> float:
        return self.celsius * 9 / 5 + 32


def read_stations(path: str) -> dict[str, list[Reading]]:
    """Reads a CSV file; rows that cannot be read are skipped and counted."""
    by_station = defaultdict(list)
    skipped = 0
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter=";"):
            try:
                taken_at = datetime.fromisoformat(row["timestamp"])
                by_station[row["station_id"]].append(
                    Reading(row["station_id"], taken_at, float(row["temp_c"]))
                )
            except (KeyError, ValueError) as error:
                skipped += 1
                print(f"line skipped: {error!r}")
    if skipped > 0:
        print(f"{skipped} lines were skipped in {path}")
    return dict(by_station)


def moving_average(values: list[float], width: int = 5) -> list[float]:
    if width <= 0:
        raise ValueError("width must be positive")
    total, averages = sum(values[:width]), []
    for index in range(width, len(values) + 1):
        averages.append(total / width)
        if index < len(values):
            total += values[index] - values[index - width]
    return averages


class Store:
    def __init__(self, path=":memory:"):
        self.db = sqlite3.connect(path)
        self.db.execute(
            "CREATE TABLE IF NOT EXISTS readings (station TEXT, taken_at INTEGER, celsius REAL)"
        )

    def add(self, *readings):
        rows = [(r.station, int(r.taken_at.timestamp()), r.celsius) for r in readings]
        self.db.executemany("INSERT INTO readings VALUES (?, ?, ?)", rows)
        self.db.commit()

    def extremes(self, station, days=30):
        since = datetime.now() - timedelta(days=days)
        query = "SELECT MIN(celsius), MAX(celsius) FROM readings WHERE station = ? AND taken_at > ?"
        return self.db.execute(query, (station, since.timestamp())).fetchone()


if __name__ == "__main__":
    store = Store("weather.db")
    for station, readings in read_stations("export.csv").items():
        store.add(*readings)
        low, high = store.extremes(station)
        print(f"{station:<12} {low:6.1f} {high:6.1f}")

# ---

package queue

import (
	"context"
	"errors"
	"sync"
	"time"
)

var ErrClosed = errors.New("queue: closed")

type item[T any] struct {
	value    T
	priority int
	addedAt  time.Time
}

// Queue hands out values by priority, the oldest first among equals.
type Queue[T any] struct {
	mu     sync.Mutex
	items  []item[T]
	wake   chan struct{}
	closed bool
}

func New[T any]() *Queue[T] {
	return &Queue[T]{wake: make(chan struct{}, 1)}
}

func (q *Queue[T]) Push(value T, priority int) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return ErrClosed
	}
	q.items = append(q.items, item[T]{value, priority, time.Now()})
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return nil
}

func (q *Queue[T]) Pop(ctx context.Context) (value T, err error) {
	for {
		q.mu.Lock()
		if len(q.items) > 0 {
			best := 0
			for i := range q.items {
				if q.items[i].priority > q.items[best].priority {
					best = i
				}
			}
			value = q.items[best].value
			q.items = append(q.items[:best], q.items[best+1:]...)
			q.mu.Unlock()
			return value, nil
		}
		q.mu.Unlock()
		select {
		case <-q.wake:
		case <-ctx.Done():
			return value, ctx.Err()
		}
	}
}

-- ---

SELECT o.id, c.name, SUM(l.quantity * l.unit_price) AS total
FROM orders o
JOIN customers c ON c.id = o.customer_id
LEFT JOIN order_lines l ON l.order_id = o.id
WHERE o.created_at >= DATE '2024-01-01' AND o.status NOT IN ('cancelled', 'draft')
GROUP BY o.id, c.name
HAVING SUM(l.quantity * l.unit_price) > 1000
ORDER BY total DESC
LIMIT 50;

/* --- */

.card {
  display: grid;
  grid-template-columns: minmax(0, 1fr) auto;
  gap: 0.75rem 1.25rem;
  padding: clamp(1rem, 2vw, 2rem);
  border: 1px solid var(--border, #d0d7de);
  border-radius: 8px;
  background: color-mix(in srgb, var(--surface) 92%, black);
}

.card:hover > .title { color: #0969da; text-decoration: underline; }

@media (max-width: 640px) {
  .card { grid-template-columns: 1fr; }
}

#!/usr/bin/env bash
set -euo pipefail
for file in "$SOURCE"/*.jpg; do
  name=$(basename "$file" .jpg)
  convert "$file" -resize 1600x1600\\> -quality 82 "$TARGET/$name.webp"
  printf '%s\\t%d\\n' "$name" "$(stat -c %s "$TARGET/$name.webp")" >> "$TARGET/index.tsv"
done

fn parse_header(line: &str) -> Result<(String, String), ParseError> {
    let (name, value) = line.split_once(':').ok_or(ParseError::NoColon)?;
    if name.is_empty() || name.bytes().any(|b| !is_token(b)) {
        return Err(ParseError::BadName(name.to_owned()));
    }
    Ok((name.to_ascii_lowercase(), value.trim().to_owned()))
}

`

const CHINESE = `清晨五点半，老城的巷子还没有完全醒来。卖豆浆的阿姨已经支起了摊子，蒸笼里冒出白色的热气，混着油条的香味飘得很远。李明骑着一辆旧自行车从石板路上经过，车铃声在墙壁之间来回响着。他今天要去城北的图书馆，那里藏着一本他找了三年的地方志。

要做好一碗红烧牛肉面，关键在于汤底。先把牛腩切成两厘米见方的块，冷水下锅焯去血沫，再用热水冲洗干净。锅里放少许油，加入姜片、葱段、八角和桂皮炒香，然后倒入豆瓣酱和番茄，翻炒到出红油。最后加入高汤，小火慢炖两个小时以上。面条煮好之后，撒上香菜和蒜苗，一碗热气腾腾的面就完成了。

好的，我来解释一下什么是数据库索引。索引就像一本书的目录：没有目录的时候，你必须一页一页地翻才能找到想要的内容；有了目录，就可以直接跳到对应的页码。不过索引也有代价，每次插入或者更新数据时，数据库都要同时维护索引，所以写入会变慢，磁盘占用也会增加。一般来说，经常出现在查询条件里的字段适合建索引，而很少被查询、或者取值种类很少的字段就没有必要了。

人工智能的发展给教育带来了新的机会，也带来了新的问题。一方面，学生可以随时得到个性化的辅导，不再受到地区和时间的限制；另一方面，如果过分依赖机器给出的答案，独立思考的能力就可能退化。因此，许多学校开始重新设计作业：不再只看结果，而是要求学生写出推理的过程，并且说明哪些部分使用了工具。教师的角色也在变化，从知识的传授者变成学习的引导者。

用户问的是如何退租。我需要先确认合同里有没有约定提前通知的期限。通常是一个月，但也有写两个月的。如果没有约定，就按照当地的规定处理。押金方面，房东应当在交房之后的合理时间内退还，除非有损坏需要赔偿。我应该提醒用户拍照留证，并且用书面形式通知，最好保留快递单据或者聊天记录。

黄河发源于青藏高原，全长约五千四百六十四公里，流经九个省区，最后注入渤海。由于中游经过黄土高原，河水带走了大量泥沙，因此成为世界上含沙量最高的河流之一。历史上，黄河多次改道，给两岸人民带来了灾难，也塑造了肥沃的华北平原。二十世纪以来，人们修建了许多水库和堤坝，并在上游植树种草，泥沙量已经明显减少。

会议定于下周三下午两点在三楼会议室举行，请各部门负责人准时参加。会议主要讨论第三季度的预算执行情况，以及明年新产品的推广计划。请提前准备好相关的报表，并于周一下班之前发送到行政部邮箱。如有特殊情况不能出席，请安排代表参加，并提前说明原因。谢谢大家的配合。

雨下了整整一夜。外婆坐在窗边，手里的毛衣已经织到了袖口。她说，年轻的时候村里没有电，下雨天大家就围在火塘边讲故事，讲山里的狐狸，也讲出海不归的渔夫。我问她最喜欢哪一个，她想了很久，说：“最喜欢的那个，还没有人讲完。”窗外的芭蕉叶被雨点打得噼啪作响，像是在替她把故事继续讲下去。

选择笔记本电脑时，建议先考虑三个方面：用途、预算和便携性。如果主要用来写文档、浏览网页，普通的处理器和八吉字节内存就足够了；如果要剪辑视频或者训练模型，就需要独立显卡和更大的内存。屏幕方面，分辨率越高，显示越细腻，但耗电也会增加。最后别忘了查看售后服务的条款，很多品牌在不同地区的保修政策并不一样。

老渔夫把船拴在码头的木桩上，抖了抖蓑衣上的水珠。三十年来，他每天都在这个时辰回港，连码头上的猫都认得他的脚步声。今天的收获不多，只有半筐小杂鱼和两只螃蟹。他把螃蟹留给了等在岸边的小孙女，她正踮着脚尖，朝筐里张望。

这段代码报错的原因是，函数在数据加载完成之前就被调用了。由于请求是异步的，程序不会等待结果返回，而是继续往下执行，因此变量仍然是空值。解决办法有两种：第一，使用等待关键字，让程序在这一行暂停；第二，把后续的处理写进回调函数里。我推荐第一种，因为代码更容易阅读，也更方便处理异常。

糖尿病患者在饮食上需要注意控制总热量，合理分配三餐。主食可以适当选择粗粮，例如燕麦、荞麦和糙米，因为它们的升糖指数较低。蔬菜应当占到每餐的一半左右，水果则要根据血糖情况适量食用。除了饮食之外，每周至少进行五次、每次三十分钟的中等强度运动，并且定期监测血糖。如果出现头晕、出汗等低血糖症状，应立即补充糖分，并及时就医。

春秋战国时期，各诸侯国之间战争频繁，思想却空前活跃。儒家主张以仁义治国，强调礼的重要性；道家崇尚自然，认为统治者应当无为而治；法家则重视法律和制度，主张赏罚分明。这些学说互相争论，也互相影响，后人称之为“百家争鸣”。秦国采用了法家的主张，国力迅速增强，最终统一了六国。

根据你提供的数据，去年公司的总收入为三千二百万元，同比增长百分之十五，但净利润只增长了百分之四。主要原因是原材料价格上涨，以及新开的两家门店还处在亏损状态。如果今年能够把库存周转天数从六十天降低到四十五天，预计可以释放大约两百万元的现金流。下面我分别列出每一项的计算过程，方便你核对。

`

const JAPANESE = `駅前の古い喫茶店は、朝七時になると静かに扉を開ける。店主の田中さんは七十歳を過ぎているが、毎朝豆を挽く手つきは少しも変わらない。常連の客たちは新聞を広げ、トーストの焼ける匂いの中で一日の始まりを待つ。私が初めてこの店に入ったのは、大学受験に失敗した春のことだった。

ご質問ありがとうございます。パスワードを忘れた場合は、次の手順で再設定してください。まず、ログイン画面の「パスワードをお忘れの方」をクリックします。次に、登録済みのメールアドレスを入力すると、確認コードが送信されます。コードの有効期限は十五分ですので、お早めに入力してください。メールが届かない場合は、迷惑メールフォルダもご確認ください。

肉じゃがを作るには、まずじゃがいもの皮をむいて大きめに切り、水にさらしておきます。玉ねぎはくし形に、にんじんは乱切りにします。鍋に油を熱して牛肉を炒め、色が変わったら野菜を加えてさらに炒めます。だし汁、砂糖、みりん、しょうゆを入れ、落としぶたをして中火で二十分ほど煮込みます。火を止めてから少し置くと、味がしみておいしくなります。

地震が起きたときは、まず自分の身を守ることが大切です。机の下にもぐり、頭を保護してください。揺れがおさまったら火の元を確認し、ドアを開けて出口を確保します。海の近くにいる場合は、津波警報を待たずに、すぐに高台へ避難してください。普段から家族と連絡方法や集合場所を決めておくと、いざというときに慌てずに行動できます。

ユーザーは配列の並べ替えについて聞いている。入力の大きさは最大で百万件なので、単純な挿入ソートでは間に合わない。安定性が必要かどうかは書かれていないが、同じ値の順序を保つと言っているので、マージソートか標準ライブラリの安定ソートを使うのがよさそうだ。メモリの制約も確認しておこう。

祖父の家の裏には小さな川が流れていて、夏になると蛍が飛んだ。都会から来た従兄弟たちは虫を怖がったが、蛍だけは別だった。暗闇の中に緑色の光がひとつ、またひとつと浮かび、やがて川全体が呼吸をしているように見えた。あの光景をもう一度見たいと思いながら、気がつけば二十年が過ぎてしまった。

本プロジェクトの目的は、地方の公共交通を維持しながら、運営費用を削減することにあります。調査の結果、平日の昼間の乗車率は十二パーセントにとどまる一方、通学時間帯には座席が不足していることがわかりました。そこで、予約制の小型バスを導入し、需要に応じて経路を変更する方式を提案いたします。初年度の費用は約三千万円と見込まれます。

ご注文いただいた商品につきまして、発送が遅れておりますことを深くお詫び申し上げます。台風の影響により物流が混乱しており、お届けまでにさらに三日から五日ほどかかる見込みです。キャンセルをご希望の場合は、このメールにそのままご返信ください。ご迷惑をおかけいたしますが、何卒よろしくお願いいたします。

機械学習では、データを訓練用と検証用に分けることが重要です。同じデータで学習と評価を行うと、モデルがデータを丸暗記してしまい、未知のデータに対する性能を正しく測ることができません。これを過学習と呼びます。対策としては、データを増やす、モデルを単純にする、正則化を加える、学習を早めに打ち切るなどの方法があります。

山道を登りきると、急に視界が開けて、谷の向こうに雪をかぶった峰が見えた。案内人は腰を下ろし、水筒の水をひと口飲んでから、あれが昔の国境だと言った。風が強く、話し声はすぐに吹き飛ばされてしまう。私たちはしばらく黙ったまま、雲の影が斜面をゆっくりと移動していくのを眺めていた。

江戸時代の日本では、庶民の教育が広く普及していた。各地に寺子屋が開かれ、子どもたちは読み書きやそろばんを学んだ。教科書には手紙の文例が使われることが多く、商売や農業に必要な知識も同時に身につけることができた。十九世紀の半ばには、男子の四割以上が文字を読めたと推定されている。

会議の要点をまとめると、次の三つになります。一つ目は、新しいシステムへの移行を来年の四月までに完了すること。二つ目は、移行期間中も既存のサービスを停止しないこと。三つ目は、利用者への説明会を二回以上開催することです。予算については、来週の火曜日までに各部署から見積もりを提出していただくことになりました。

`

const KOREAN = `아침 일찍 시장에 나가면 하루가 다르게 계절이 바뀌는 것을 느낄 수 있다. 봄에는 냉이와 달래가, 여름에는 참외와 수박이, 가을에는 햅쌀과 버섯이 좌판을 가득 채운다. 할머니는 언제나 같은 자리에 앉아 손님들에게 덤을 얹어 주셨다. 나는 그 옆에서 동전을 세며 숫자를 배웠다.

네, 알겠습니다. 환불 절차를 안내해 드리겠습니다. 먼저 주문 내역에서 해당 상품을 선택하시고 ‘반품 신청’ 버튼을 눌러 주세요. 상품을 받은 날부터 칠 일 이내에 신청하셔야 하며, 포장을 뜯은 전자 제품은 반품이 제한될 수 있습니다. 택배 기사가 방문하면 상품을 전달해 주시고, 검수가 끝난 뒤 삼 일에서 오 일 안에 결제하신 수단으로 환불됩니다.

김치찌개를 맛있게 끓이려면 잘 익은 김치를 써야 한다. 냄비에 돼지고기를 넣고 볶다가 김치를 넣어 함께 볶는다. 김치가 부드러워지면 물을 붓고 고춧가루와 다진 마늘을 넣는다. 센 불에서 한소끔 끓인 다음 약한 불로 줄여 이십 분쯤 더 끓인다. 마지막으로 두부와 대파를 올리면 완성이다. 밥 한 공기는 금방 비우게 된다.

컴퓨터 네트워크에서 지연 시간과 대역폭은 서로 다른 개념이다. 대역폭은 일정한 시간 동안 얼마나 많은 데이터를 보낼 수 있는지를 뜻하고, 지연 시간은 데이터 하나가 목적지까지 가는 데 걸리는 시간을 뜻한다. 고속도로에 비유하면 대역폭은 차선의 수이고 지연 시간은 도착하기까지 걸리는 시간이다. 차선을 아무리 늘려도 서울에서 부산까지의 거리는 줄어들지 않는다.

사용자가 여행 일정을 짜 달라고 했다. 예산은 백만 원이고 기간은 삼박 사일이다. 제주도라면 항공권과 렌터카를 먼저 계산해야 한다. 아이가 있다고 했으니 이동 시간을 짧게 잡고, 비가 올 때 갈 수 있는 실내 장소도 하나씩 넣는 것이 좋겠다. 숙소는 두 곳으로 나누면 동쪽과 서쪽을 모두 볼 수 있다.

바다는 밤새 울었다. 방파제 끝에 선 노인은 등대 불빛이 한 바퀴 돌 때마다 같은 곳을 바라보았다. 사람들은 그가 돌아오지 않을 배를 기다린다고 했지만, 그는 한 번도 그렇다고 말한 적이 없었다. 다만 새벽이 되면 천천히 일어나 모자를 고쳐 쓰고, 빈 도시락을 들고 언덕길을 올라갈 뿐이었다.

정부는 내년부터 소상공인을 위한 지원 제도를 확대하기로 했다. 연 매출이 일정 금액 이하인 사업자는 낮은 금리로 자금을 빌릴 수 있고, 폐업한 뒤 다시 창업하는 경우에는 교육과 상담을 무료로 받을 수 있다. 전문가들은 지원의 규모보다 신청 절차를 간단하게 만드는 것이 더 중요하다고 지적했다.

면접을 준비할 때는 회사의 홈페이지를 먼저 살펴보고, 최근에 나온 기사나 발표 자료를 읽어 보는 것이 좋습니다. 예상 질문을 열 개 정도 적어 놓고 소리 내어 대답하는 연습을 하세요. 모르는 질문을 받았을 때는 솔직하게 모른다고 말한 다음, 어떻게 알아볼 것인지를 설명하면 오히려 좋은 인상을 줄 수 있습니다.

이 오류는 데이터베이스 연결이 닫힌 뒤에 쿼리를 실행했기 때문에 발생합니다. 연결 풀의 최대 크기를 늘리거나, 작업이 끝날 때까지 연결을 유지하도록 코드를 수정해야 합니다. 먼저 로그에서 연결이 언제 닫혔는지 확인하시고, 시간 제한 설정이 너무 짧지 않은지도 살펴보세요. 아래에 수정한 예제를 적어 두었습니다.

조선 시대의 한양은 네 개의 큰 문과 네 개의 작은 문으로 둘러싸여 있었다. 밤 열 시가 되면 종을 스물여덟 번 쳐서 문을 닫았고, 새벽 네 시에 서른세 번을 쳐서 다시 열었다. 사람들은 이 종소리에 맞추어 하루를 살았다. 지금도 새해 첫날이 되면 많은 시민이 모여 서른세 번의 종소리를 듣는다.

건강을 지키려면 규칙적인 운동과 충분한 잠이 필요합니다. 성인은 하루에 일곱 시간에서 여덟 시간 정도 자는 것이 좋으며, 잠들기 한 시간 전에는 휴대 전화를 보지 않는 것이 도움이 됩니다. 커피는 오후 두 시 이후에는 마시지 마세요. 운동은 일주일에 세 번, 한 번에 삼십 분 이상 걷는 것만으로도 충분한 효과가 있습니다.

고양이는 창문 위에 앉아 내리는 눈을 바라보고 있었다. 아이가 다가가 이름을 불렀지만 귀만 살짝 움직일 뿐이었다. 마당의 감나무에는 까치를 위해 남겨 둔 감이 세 개 달려 있었고, 그 위로 하얀 눈이 소복이 쌓였다. 부엌에서는 된장국 끓는 냄새가 났다. 겨울 방학의 첫날이었다.

`

/** What a model calls tools with, as objects. */
const CALLS: unknown[] = [
  { city: 'Lisbon', unit: 'celsius', days: 3 },
  { query: 'SELECT id, email FROM users WHERE last_login < ? LIMIT 100', params: ['2024-03-01'] },
  {
    path: 'src/server/routes.ts',
    old_string: "app.get('/health', (req, res) => res.send('ok'))",
    new_string:
      "app.get('/health', async (req, res) => {\n  const ok = await db.ping()\n  res.status(ok ? 200 : 503).json({ ok })\n})",
    replace_all: false
  },
  { command: 'grep -rn "TODO" --include="*.py" . | head -20', timeout: 30000 },
  {
    title: 'Quarterly review',
    start: '2025-04-17T09:30:00+02:00',
    end: '2025-04-17T11:00:00+02:00',
    attendees: ['j.novak@example.org', 'li.wei@example.org', 'amara@example.org'],
    location: { building: 'B', room: '2.14' },
    reminders: [
      { method: 'email', minutes: 1440 },
      { method: 'popup', minutes: 10 }
    ]
  },
  {
    url: 'https://example.org/api/v2/items?page=3&sort=-created',
    headers: { Accept: 'text/html' }
  },
  { latitude: 48.2081743, longitude: 16.3738189, radius_m: 2500, category: 'pharmacy' },
  {
    to: 'accounting@example.com',
    subject: 'Invoice 2025-0417 for the spring delivery',
    body: 'Hello,\n\nplease find attached the invoice for 12 pallets delivered on 8 April. The amount of €4,380.50 is due within 30 days.\n\nKind regards,\nPetra'
  },
  { expression: '(1.07^12 - 1) * 2500 / 0.07', precision: 2 },
  {
    file_path: '/home/dev/project/tests/test_parser.py',
    content:
      'import pytest\n\nfrom parser import parse\n\n\n@pytest.mark.parametrize("text, expected", [("a=1", {"a": "1"}), ("", {})])\ndef test_parse(text, expected):\n    assert parse(text) == expected\n'
  },
  { pattern: '^\\s*def (\\w+)\\(', flags: ['MULTILINE'], max_results: 50 },
  {
    todos: [
      { id: '1', content: 'Read the failing test', status: 'completed', priority: 'high' },
      {
        id: '2',
        content: 'Reproduce with a smaller input',
        status: 'in_progress',
        priority: 'high'
      },
      { id: '3', content: 'Write down what was learned', status: 'pending', priority: 'low' }
    ]
  },
  { sku: 'AX-4471-B', quantity: 24, warehouse: 'VIE-2', express: true, note: null },
  {
    chart: 'line',
    x: ['Jan', 'Feb', 'Mar', 'Apr', 'May', 'Jun'],
    series: [
      { name: 'Income', values: [1203.5, 1189, 1310.25, 1422, 1398.75, 1501] },
      { name: 'Costs', values: [980, 1011.5, 995.75, 1102, 1087.25, 1130] }
    ]
  },
  { text: '会议改到星期四上午十点', target_language: 'en', formality: 'neutral' },
  {
    departure: 'ZRH',
    arrival: 'NRT',
    date: '2025-10-03',
    return_date: '2025-10-19',
    passengers: { adults: 2, children: 1, infants: 0 },
    cabin: 'premium_economy',
    max_stops: 1
  },
  { user_id: '7f3c9a52-1b0e-4d8f-9c61-2e5a8b04d7f3', fields: ['name', 'plan', 'created_at'] },
  {
    filter: {
      and: [
        { field: 'price', gte: 20, lt: 80 },
        { not: { field: 'brand', in: ['acme', 'globex'] } }
      ]
    },
    sort: [{ rating: 'desc' }],
    size: 25
  },
  {
    name: 'nightly-backup',
    schedule: '15 3 * * 1-5',
    image: 'registry.example.org/tools/backup:1.8.2',
    env: { TARGET: 's3://backups/nightly', KEEP: '14' }
  },
  {
    reasoning: 'The user asked for the total including tax, so the rate has to be looked up first.',
    country: 'PT',
    net: 1299.99
  },
  { ticker: 'SAP', from: '2023-01-01', to: '2024-12-31', interval: '1mo', adjusted: true },
  {
    question: 'Which of these suppliers can deliver before the end of the month?',
    options: ['the first one', 'the second', 'both'],
    allow_multiple: true
  },
  { selector: '#checkout > form button[type="submit"]', action: 'click', wait_for: 'networkidle' },
  {
    patient: { age: 54, weight_kg: 81.5, sex: 'f' },
    drug: 'metformin',
    dose_mg: 850,
    times_per_day: 2
  },
  {
    base: 'main',
    head: 'fix/empty-header',
    title: 'Keep empty headers',
    body: '## Why\n\nAn empty header was dropped.\n\n## What\n\n- keeps it\n- adds a test\n'
  },
  {
    matrix: [
      [1, 0, -2.5],
      [0.333, 4, 7],
      [12, -8, 100]
    ],
    operation: 'inverse'
  },
  {
    device: 'living_room_lamp',
    state: { on: true, brightness: 65, color: '#ffcc88' },
    transition: 1.5
  },
  {
    sparql:
      'SELECT ?city ?population WHERE { ?city wdt:P31 wd:Q515 ; wdt:P1082 ?population . } ORDER BY DESC(?population) LIMIT 10'
  }
]

/** Pieces of text of one kind, in the order they were written. */
export const CORPUS = {
  prose: paragraphs(PROSE),
  code: paragraphs(CODE),
  chinese: paragraphs(CHINESE),
  japanese: paragraphs(JAPANESE),
  korean: paragraphs(KOREAN),
  tools: CALLS.map(each => JSON.stringify(each))
}

function paragraphs(text: string): string[] {
  return text.split(/(?<=\n\n)/)
}
