"""Generate the quickstart's sample data: paper-like Chinese titles, keywords and paraphrased queries.

    python scripts/make_sample_data.py sample_data/recall

Same seed, same files, in the layout of literature_search_data: train_unsupervised.csv (a text a line), corpus.csv
(title and keywords run together), dev.csv (paraphrased query, its document), test.csv (title, title with keywords;
every second pair is a mismatch). No training text holds a query's wording, and no query of dev.csv is trained on.
"""

import argparse
import os
import random

# Per field: what is studied, aspects of it, and methods of the field.
FIELDS = {
    "医学": (
        "2型糖尿病患者 冠心病介入治疗 慢性阻塞性肺疾病 急性脑梗死 老年高血压 儿童哮喘 "
        "乳腺癌术后 肝硬化腹水 类风湿关节炎 慢性肾衰竭 胃溃疡 缺血性心肌病 抑郁症 骨质疏松 "
        "新生儿黄疸 重症肺炎",
        "血清炎症因子 生活质量 临床疗效 危险因素 并发症 护理需求 预后 用药依从性 免疫功能 "
        "睡眠质量 费用负担 复发率",
        "随机对照试验 多因素回归分析 中西医结合 延续护理 队列随访 荟萃分析",
    ),
    "计算机": (
        "无线传感器网络 图像检索系统 中文分词 云存储平台 推荐系统 入侵检测 人脸识别 知识图谱 "
        "语音识别 软件缺陷 分布式数据库 移动边缘计算 虚拟机调度 网页去重 机器翻译 车牌定位",
        "能耗优化 查询效率 准确率 数据安全 负载均衡 特征提取 实时性 鲁棒性 隐私保护 冗余消除 "
        "可扩展性 容错能力",
        "遗传算法 支持向量机 卷积神经网络 粒子群优化 模糊聚类 强化学习",
    ),
    "教育": (
        "高职院校学生 农村小学教师 大学英语课堂 研究生导师 职业教育实训 学前儿童 高中物理实验 "
        "留守儿童 思想政治理论课 在线课程 体育特长生 民办高校 双语教学 校企合作 特殊教育学校 "
        "成人教育",
        "学习动机 心理健康 教学评价 就业能力 职业倦怠 创新意识 阅读兴趣 课程设置 师生关系 "
        "自主学习 信息素养 激励机制",
        "问卷调查 翻转课堂 行动研究 案例教学 扎根理论 项目学习",
    ),
    "经济": (
        "国有企业 农村信用社 上市公司高管 中小微企业 房地产市场 跨境电商 商业银行 家族企业 "
        "产业园区 物流企业 保险公司 新能源汽车产业 制造业集群 旅游景区 地方政府债务 股票市场",
        "创新绩效 融资约束 股权激励 风险管理 税收负担 社会责任 投资效率 供应链协同 信息披露 "
        "价格波动 全要素生产率 竞争力",
        "面板数据 博弈模型 数据包络分析 层次分析法 双重差分 结构方程",
    ),
    "农业": (
        "冬小麦 设施番茄 水稻秧苗 苹果果园 奶牛养殖 玉米秸秆 茶树新梢 棉花黄萎病 淡水鱼塘 "
        "马铃薯种薯 大豆根瘤 草原牧场 柑橘贮藏 温室黄瓜 生猪饲料 食用菌栽培",
        "产量构成 土壤养分 病虫害防治 水分利用效率 品质 抗旱性 氮肥用量 保鲜效果 光合特性 "
        "微生物群落 成活率 重金属积累",
        "田间试验 正交试验 遥感监测 高通量测序 模型模拟 灰色关联",
    ),
    "工程": (
        "混凝土桥梁 高速铁路路基 深基坑支护 风力发电机叶片 数控机床主轴 煤矿瓦斯 地铁隧道 "
        "燃气轮机 水库大坝 钢结构厂房 焊接机器人 汽车悬架 输电线路 锂离子电池 空调冷水机组 "
        "船舶推进轴系",
        "疲劳寿命 沉降变形 振动控制 故障诊断 结构优化 抗震性能 温度场 能效 可靠性 腐蚀防护 "
        "施工进度 载荷分布",
        "有限元分析 模糊控制 小波变换 现场监测 响应面法 蒙特卡罗模拟",
    ),
}
TITLES = ["基于{m}的{o}{a}研究", "{o}{a}的{m}分析", "{m}在{o}{a}中的应用", "{o}{a}影响因素的{m}", "{m}对{o}{a}的影响",
          "面向{o}的{a}评价方法:{m}视角"]
# A query says the same in other words, as somebody would who types it into a search box.
QUERIES = ["用{m}怎样研究{o}的{a}", "{o} {a} {m}", "{a}方面,{o}采用{m}的文献", "关于{o}{a},运用{m}",
           "{o}的{a}({m})", "利用{m}考察{a}:以{o}为对象"]
SYNONYMS = {"患者": "病人", "优化": "改进", "影响": "作用", "疗效": "治疗效果", "学生": "学员", "教师": "老师",
            "企业": "公司", "风险": "隐患", "评价": "评估", "效率": "效能", "故障": "失效", "防治": "防控",
            "养殖": "饲养", "机制": "机理"}


def make_papers(rng: random.Random) -> list[dict[str, str]]:
    """Every object x aspect of every field once, with a method each, in random order."""
    papers = []
    for field, words in FIELDS.items():
        objects, aspects, methods = (part.split() for part in words)
        for thing in objects:
            for aspect in aspects:
                part = {"o": thing, "a": aspect, "m": rng.choice(methods)}
                keywords = [thing, aspect, part["m"], rng.choice(aspects), field]
                rng.shuffle(keywords)
                query = rng.choice(QUERIES).format(**part)
                for word, synonym in SYNONYMS.items():
                    query = query.replace(word, synonym)
                title = rng.choice(TITLES).format(**part)
                papers.append({"title": title, "document": title + ",".join(keywords), "query": query})
    rng.shuffle(papers)
    return papers


def write_lines(path: str, lines: list[str]) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
    print(f"{path}: {len(lines)} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder to write to, made if need be")
    parser.add_argument("--seed", type=int, default=1000, help="random seed (default: %(default)s)")
    args = parser.parse_args()
    papers = make_papers(random.Random(args.seed))
    os.makedirs(args.folder, exist_ok=True)
    train = [text for paper in papers for text in (paper["title"], paper["document"])]
    shifted = papers[1:] + papers[:1]
    test = [f"{paper['title']}\t{(other if row % 2 else paper)['document']}"
            for row, (paper, other) in enumerate(zip(papers[:200], shifted))]
    for name, lines in (("train_unsupervised.csv", train), ("corpus.csv", [paper["document"] for paper in papers]),
                        ("dev.csv", [f"{paper['query']}\t{paper['document']}" for paper in papers[:500]]),
                        ("test.csv", test)):
        write_lines(os.path.join(args.folder, name), lines)


if __name__ == "__main__":
    main()
